"""The class-conditional pipeline where there is no diffloop, and diffloop where there is code in a model's folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import tiny_models
import torch
from recorded_samples import recorded_samples
from repository import ROOT
from safetensors.torch import load_file
from script_calls import run_script

from scripts import merge_lora, sample
from trainers.common.class_pipeline import MODULE, ClassConditionalPipeline
from trainers.conditional_ddpm import ConditionalDDPMTrainer
from trainers.dit import DiTTrainer
from trainers.model_configs import OWN_PIPELINE
from trainers.pretrained import read_model

TASK = "conditional_ddpm"
SOURCE = ROOT / "trainers" / "common" / "class_pipeline.py"
ELSEWHERE = """
import json, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("trainers", "datasets_lib", "scripts", "train"):
            raise ModuleNotFoundError(f"there is no {name} here")

sys.meta_path.insert(0, Refuse())
import torch
from diffusers import DiffusionPipeline

folders, asked, again = json.loads(sys.argv[1])
for folder in folders:
    for options in ({}, {"custom_pipeline": folder}):
        pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **options)
        pipeline.set_progress_bar_config(disable=True)
        generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
        drawn = pipeline(["3", 1], generator=generators, output_type="pt", **asked).images
        torch.save(drawn, f"{folder}/drawn-{len(options)}.pt")
pipeline.save_pretrained(again)
DiffusionPipeline.from_pretrained(again, trust_remote_code=True)
assert not any(name.startswith(("trainers", "datasets_lib")) for name in sys.modules)
"""


def latents():
    """Options of task dit for latents of 8 x 8."""
    return {"base.resolution": 32, "base.channels": 3, "dit.vae": str(tiny_models.model("sd1") / "vae")}


@pytest.fixture
def run(run_in_process):
    return lambda name="run", task=TASK, **options: run_in_process(name, task, **{"base.max_train_steps": 1} | options)


def index_of(folder):
    return json.loads((folder / "model_index.json").read_text())


def draw(pipeline, **asked):
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    return pipeline(["3", 1], generator=generators, output_type="pt", **asked).images


def test_plain_diffusers_draws_where_there_is_no_diffloop(run, run_in_process, tmp_path):
    """Pixels, latents and a flow; in a process that can import nothing of diffloop's, from another folder."""
    folders = [
        run("unet"),
        run("flow", **{f"{TASK}.objective": "rectified_flow"}),
        run("dit", "dit", **latents()),
    ]
    asked = {"guidance_scale": 2.0, "num_inference_steps": 2}
    arguments = json.dumps([list(map(str, folders)), asked, str(tmp_path / "again")])
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    clean |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-c", ELSEWHERE, arguments]
    found = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr[-3000:]
    for folder, task in zip(folders, (ConditionalDDPMTrainer, ConditionalDDPMTrainer, DiTTrainer), strict=True):
        wanted = draw(task.load_pipeline(folder), **asked)
        for number in range(2):
            assert torch.equal(torch.load(folder / f"drawn-{number}.pt"), wanted)
    assert (tmp_path / "again" / "pipeline.py").read_bytes() == SOURCE.read_bytes()
    assert index_of(tmp_path / "again")["_class_name"] == OWN_PIPELINE
    assert str(tmp_path) not in (tmp_path / "again" / "model_index.json").read_text()


def test_the_file_imports_only_what_everybody_has():
    lines = [
        line.split()[1].partition(".")[0]
        for line in SOURCE.read_text().splitlines()
        if line.strip().startswith(("import ", "from "))
    ]
    assert set(lines) - {"diffusers", "torch"} <= set(sys.stdlib_module_names)
    assert "__future__" not in lines  # diffusers before 0.38 reads the annotations of __init__ as classes
    assert [MODULE, ClassConditionalPipeline.__name__] == OWN_PIPELINE


def test_a_finished_run_holds_the_class_and_its_pictures_are_the_validations(run, monkeypatch):
    drawn = recorded_samples(monkeypatch, ConditionalDDPMTrainer)
    options = {f"{TASK}.guidance_scale": 2.0, f"{TASK}.guidance_rescale": 0.3, f"{TASK}.guidance_interval": [0.1, 5.0]}
    folder = run(**options)
    assert (folder / "pipeline.py").read_bytes() == SOURCE.read_bytes()
    assert index_of(folder)["_class_name"] == OWN_PIPELINE
    pictures, labels, rng = drawn[-1]
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    assert not isinstance(pipeline, ClassConditionalPipeline)
    rng.asked.clear()
    guidance = sys.modules[type(pipeline).__module__].Guidance(2.0, 0.3, (0.1, 5.0))
    asked = {"num_inference_steps": 2, "generator": rng.generators(), "output_type": "pt"}
    torch.testing.assert_close(pipeline(labels, guidance, **asked).images, pictures, rtol=0, atol=1e-5)


def test_pictures_of_a_vae_that_is_copied(run):
    """The index lists it, its files are those of its folder, and sample.py reads it from the run."""
    vae, folder = Path(latents()["dit.vae"]), run("run", "dit", **latents())
    assert index_of(folder)["vae"] == ["diffusers", "AutoencoderKL"]
    for path in vae.iterdir():
        assert (folder / "vae" / path.name).read_bytes() == path.read_bytes()
    assert draw(DiTTrainer.load_pipeline(folder), num_inference_steps=2).shape == (2, 3, 32, 32)


# --- code that lies in a folder


@pytest.fixture
def planted(run, tmp_path):
    """A finished run without checkpoints whose pipeline.py would leave a mark."""
    folder, mark = run(), tmp_path / "mark"
    shutil.rmtree(folder / "checkpoint-1")
    code = f"open({str(mark)!r}, 'w').close()\n" + (folder / "pipeline.py").read_text()
    (folder / "pipeline.py").write_text(code)
    (folder / "unet" / "pipeline.py").write_text(code)
    return folder, mark


def test_code_in_a_folder_is_not_run(planted, tmp_path, capsys):
    folder, mark = planted
    for pipeline in (
        ConditionalDDPMTrainer.load_pipeline(folder),
        read_model(diffusers.DiffusionPipeline, folder),
        ClassConditionalPipeline.from_pretrained(folder),
        ClassConditionalPipeline.from_pretrained(folder, trust_remote_code=True),
    ):
        assert type(pipeline) is ClassConditionalPipeline
        pipeline.save_pretrained(tmp_path / "again")
        assert (tmp_path / "again" / "pipeline.py").read_bytes() == SOURCE.read_bytes()  # ours, not the folder's
    run_script(sample, folder, "--output", tmp_path / "drawn", "--number", "2")
    lora = tiny_models.lora_file(tmp_path / "lora")
    with pytest.raises(SystemExit, match="is a ClassConditionalPipeline; give Stable Diffusion or SDXL"):
        run_script(merge_lora, folder, tmp_path / "merged", "--lora", lora)
    assert "are not expected by" not in capsys.readouterr().err
    assert not mark.exists()
    diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    assert mark.exists()  # it would have been seen


@pytest.mark.parametrize(
    "name", [["evil", "ClassConditionalPipeline"], ["pipeline", "Evil"], ["pipeline"], [*OWN_PIPELINE, 1]]
)
def test_no_other_code_is_named(planted, name):
    folder, mark = planted
    (folder / "evil.py").write_text((folder / "pipeline.py").read_text())
    (folder / "model_index.json").write_text(json.dumps(index_of(folder) | {"_class_name": name}))
    with pytest.raises(ValueError, match=r"_class_name = \[.*\] names code, which is not run"):
        ConditionalDDPMTrainer.load_pipeline(folder)
    assert not mark.exists()


def test_runs_of_before_have_the_name_alone(run):
    folder = run()
    wanted = draw(ConditionalDDPMTrainer.load_pipeline(folder), num_inference_steps=2)
    (folder / "pipeline.py").unlink()
    (folder / "model_index.json").write_text(json.dumps(index_of(folder) | {"_class_name": OWN_PIPELINE[1]}))
    for pipeline in (ConditionalDDPMTrainer.load_pipeline(folder), ClassConditionalPipeline.from_pretrained(folder)):
        assert torch.equal(draw(pipeline, num_inference_steps=2), wanted)
    again = ClassConditionalPipeline.from_pretrained(folder)
    again.save_pretrained(folder)
    assert (folder / "pipeline.py").read_bytes() == SOURCE.read_bytes()


def test_the_next_export_replaces_the_file(planted, run):
    folder, mark = planted
    run("other", **{"base.max_train_steps": 2})
    shutil.copytree(folder.parent / "other" / "checkpoint-2", folder / "checkpoint-2")
    run("run", **{"base.max_train_steps": 3, "base.resume_from_checkpoint": "checkpoint-2"})
    assert (folder / "pipeline.py").read_bytes() == SOURCE.read_bytes()
    assert not mark.exists()


def test_what_is_uploaded_draws_elsewhere(run, monkeypatch, tmp_path):
    from huggingface_hub import utils

    sent = {}

    class Hub:
        def create_repo(self, name, exist_ok):
            return type("Repository", (), {"repo_id": f"me/{name}"})

        def upload_folder(self, *, repo_id, folder_path, allow_patterns, commit_message):
            paths = [path for path in Path(folder_path).rglob("*") if path.is_file()]
            names = [str(path.relative_to(folder_path)) for path in paths]
            sent[repo_id] = {
                name: Path(folder_path, name)
                for name in utils.filter_repo_objects(names, allow_patterns=allow_patterns)
            }

    monkeypatch.setattr("huggingface_hub.get_token", lambda: "token")
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    folder = run(**{"base.push_to_hub": True})
    [(repository, files)] = sent.items()
    assert {"pipeline.py", "model_index.json", "unet/config.json"} <= set(files)
    for name, path in files.items():
        (tmp_path / "downloaded" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, tmp_path / "downloaded" / name)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "downloaded", trust_remote_code=True)
    wanted = draw(ConditionalDDPMTrainer.load_pipeline(folder), num_inference_steps=2)
    assert torch.equal(draw(pipeline, num_inference_steps=2), wanted)
    card = (folder / "README.md").read_text()
    assert f'DiffusionPipeline.from_pretrained("{repository}", trust_remote_code=True)' in card
    network = f'UNet2DModel.from_pretrained("{repository}", subfolder="unet")'
    assert network in card


def test_the_lines_of_a_card_load_and_draw(run, tmp_path, monkeypatch):
    """The first lines as they are, and what the last one says about the network alone."""
    for task in (TASK, "dit"):
        folder = run(task, task)
        code = (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
        code = code.replace(f'"{folder.name}"', f'"{folder}"')
        with monkeypatch.context() as there:
            there.chdir(tmp_path)
            exec(code.replace("num_inference_steps=", "num_inference_steps=2 or "), {})
        assert (tmp_path / "sample.png").stat().st_size > 0
        network = eval(code.splitlines()[-1].partition("alone: ")[2], vars(diffusers))
        [file] = (folder / ("unet" if task == TASK else "transformer")).glob("*.safetensors")
        for name, value in load_file(file).items():
            assert torch.equal(network.state_dict()[name], value)


def test_wrong_calls_say_what_is_allowed(run):
    pipeline = ConditionalDDPMTrainer.load_pipeline(run())
    for call, message in (
        (lambda: pipeline([]), r"classes = \[\]: name at least one class"),
        (lambda: pipeline("ten"), "classes: 'ten' is no class; allowed: 0 to 9, or 0, 1"),
        (lambda: pipeline("1", sampler="heun"), "sampler = heun: must be one of ddpm, ddim, dpmsolver"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
