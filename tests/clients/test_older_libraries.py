"""Finished pipelines, LoRA files and single files in transformers 4 with diffusers 0.35 and 0.30 do what they do today.

The environments are made here by pip, without what the present one has already, above all torch; where pip reaches no
index, these tests are skipped.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from repository import ROOT, tiny
from safetensors.torch import load_file
from script_calls import run_script
from tiny_models import model
from tiny_single_files import NEEDS_VOCABULARY, single_file

from scripts import convert_lora, export_single_file, merge_lora
from train import train
from trainers.engine.config.config import load_config

pytestmark = [pytest.mark.slow, NEEDS_VOCABULARY]
SHARED = ["transformers==4.57.6", "huggingface_hub<1", "tokenizers<0.23"]
VERSIONS = {
    "0.35": [*SHARED, "diffusers==0.35.2"],
    "0.30": [*SHARED, "diffusers==0.30.3", "peft==0.15.2"],
}
CONV = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "proj_in", "ff.net.0.proj", "time_emb_proj"]
RATES = {"unet": 1e-2, "text_encoder": 1e-3, "text_encoder_2": 1e-3}
PIPELINES = {
    "ddpm": ("ddpm", None, {}),
    "conditional_ddpm": ("conditional_ddpm", None, {}),
    "dit": ("dit", None, {}),
    "vae": ("vae", None, {}),
    "noisy_classifier": ("noisy_classifier", None, {}),
    "text_to_image": ("text_to_image", "sd1", {}),
    "text_to_image_sdxl": ("text_to_image", "sdxl", {}),
}
NETWORKS = {"noisy_classifier": "classifier"}  # what is opened of a run that is no pipeline
LORAS = {
    "lora": ("lora", "sd1", {}),
    "lora_rslora": ("lora", "sd2", {"use_rslora": True}),
    "lora_dora": ("lora", "sd1", {"use_dora": True}),
    "lora_conv": ("lora", "sdxl", {"target_modules": CONV, "use_rslora": True, "learning_rate": RATES}),
    "lora_velocity": ("lora", "sd1", {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
    "lcm_lora": ("lcm_lora", "sd1", {}),
}
REFUSED = {  # what older ones do not read, and say so
    ("lora_dora-kohya", "0.30"): "size mismatch for",  # DoRA's magnitudes, one by one
    ("single_sd2-hub", "0.30"): "self_attn.q_proj.bias expected shape",  # it takes projection_dim for the width
}
FAMILIES = ("sd1", "sd2", "sdxl")
FORMATS = ("diffusers", "kohya")
MERGED = ("lora", "lora_conv")


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """{name: arguments of older_client.opened} of everything that was trained, merged, converted and exported."""
    folder = tmp_path_factory.mktemp("written")
    found = {}
    for name, (task, family, options) in (PIPELINES | LORAS).items():
        trained(folder / name, task, model(family) if family else None, options)
        if name in PIPELINES:
            found[name] = {"folder": str(folder / name / NETWORKS.get(name, ""))}
    trained(folder / "variant", "text_to_image", model("sd1"), {}, export_variant="fp16")
    found |= {f"variant-{name}": {"folder": str(folder / "variant"), "variant": name} for name in ("fp16", None)}
    for name, (_, family, _) in LORAS.items():
        kohya = folder / name / f"{name}.safetensors"
        if name == "lora_dora":  # which a run does not write
            convert_lora.convert(folder / name, kohya, dora=True)
        files = {"diffusers": folder / name / "pytorch_lora_weights.safetensors", "kohya": kohya}
        lines = scheduler_lines(folder / name / "README.md")
        for form in FORMATS:
            found[f"{name}-{form}"] = {"folder": str(model(family)), "lora": str(files[form]), "lines": lines}
    found["lora_velocity-without"] = found["lora_velocity-diffusers"] | {"lines": ""}
    for name in MERGED:
        run_script(merge_lora, model(LORAS[name][1]), folder / f"merged_{name}", "--lora", folder / name)
        found[f"merged_{name}"] = {"folder": str(folder / f"merged_{name}")}
    for family in FAMILIES:
        found |= of_single_file(family, folder)
    return found


def trained(folder, task, base, options, **of_base):
    document = json.loads(tiny(task).read_text())
    document["base"] |= {"output_dir": str(folder)} | of_base
    document[task] |= ({"pretrained_model_name_or_path": str(base)} if base else {}) | options
    path = folder.with_suffix(".json")
    path.write_text(json.dumps(document))
    train(load_config(path, trust_code=True))
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def scheduler_lines(card):
    """What a card does between loading the base and loading the LoRA: it sets the scheduler."""
    code = card.read_text().split("```python\n")[1].partition("pipeline.load_lora_weights")[0]
    return "".join(line for line in code.splitlines(True) if not line.startswith("pipeline = "))


def of_single_file(family, folder):
    """A LoRA merged into its base, which is a single file: the pipeline, and the file that is exported of it."""
    base, merged, exported = single_file(family), folder / f"single_{family}", folder / f"{family}.safetensors"
    rates = {"learning_rate": RATES} if family == "sdxl" else {}
    trained(folder / f"single_lora_{family}", "lora", base, rates)
    run_script(merge_lora, base, merged, "--lora", folder / f"single_lora_{family}")
    run_script(export_single_file, merged, exported)
    job = {"folder": str(merged)}
    found = {f"single_{family}": job, f"single_{family}-file": job | {"file": str(exported)}}
    if family == "sd2":
        config = shutil.copytree(merged, folder / "single_sd2_hub") / "text_encoder" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"projection_dim": 16}))  # half of its width
        found["single_sd2-hub"] = {"folder": str(folder / "single_sd2_hub"), "file": str(exported)}
    return found


@pytest.fixture(scope="module")
def results(jobs, tmp_path_factory):
    """results(version) -> (tensors, errors) of the jobs; "" are the present versions."""
    folder, made = tmp_path_factory.mktemp("environments"), {}
    (folder / "jobs.json").write_text(json.dumps(jobs))

    def of(version):
        if version not in made:
            python = environment(folder / f"diffusers-{version}", version) if version else Path(sys.executable)
            out = folder / f"out-{version}"
            settings = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
            settings |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / f"hub-{version}"), "OMP_NUM_THREADS": "1"}
            script = [ROOT / "tests/helpers/older_client.py", folder / "jobs.json", out]
            subprocess.run([python, *script], check=True, cwd=folder, env=settings)
            about = json.loads(out.with_name(f"{out.name}.json").read_text())
            assert about["diffusers"].startswith(version)
            assert about["transformers"].startswith("4." if version else "5.")
            assert not version or not about["diffloop"]
            made[version] = load_file(f"{out}.safetensors"), about["errors"]
        return made[version]

    return of


def environment(folder, version):
    """The Python of a new environment with older libraries in front of the present ones."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin/python", "install", "--quiet", "--no-deps"]
    done = subprocess.run([*pip, *VERSIONS[version]], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip cannot install {', '.join(VERSIONS[version])}: {done.stderr.strip().splitlines()[-1]}")
    [own] = folder.glob("lib/python*/site-packages")
    (own / "present.pth").write_text(sysconfig.get_paths()["purelib"])
    return folder / "bin/python"


def compare(results, version, name, parts=""):
    (new, now), (old, before) = results(""), results(version)
    assert now.get(name) is None
    if (refusal := REFUSED.get((name, version))) is not None:
        assert refusal in before[name]
        return
    assert before.get(name) is None
    wanted = {key: value for key, value in new.items() if key.startswith(f"{name}|{parts}")}
    assert {key for key in old if key.startswith(f"{name}|{parts}")} == wanted.keys()
    assert wanted
    for key, value in wanted.items():
        torch.testing.assert_close(old[key], value, rtol=0, atol=1e-6, msg=key)


MADE = [*PIPELINES, *(f"merged_{name}" for name in MERGED), "variant-fp16", "variant-None"]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", [*MADE, *(f"single_{family}" for family in FAMILIES)])
def test_pipelines_draw_the_same_in_transformers_4(results, version, name):
    compare(results, version, name)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_exported_single_files_draw_what_their_pipelines_draw(results, version, family):
    compare(results, version, f"single_{family}-file")
    for made in ("", version):
        tensors, _ = results(made)
        for part in ("picture", "embedding", "tokens"):
            file, pipeline = (tensors[f"single_{family}{ending}|{part}"] for ending in ("-file", ""))
            torch.testing.assert_close(file, pipeline, rtol=0, atol=1e-6)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", [f"{name}-{form}" for name in LORAS for form in FORMATS])
def test_loras_change_the_same_in_older_diffusers(results, version, name):
    compare(results, version, name)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_file_of_stable_diffusion_2_with_the_hubs_config(results, version):
    """Whose projection_dim is half the text encoder's width, and belongs to a projection that no picture needs."""
    compare(results, version, "single_sd2-hub")


def test_the_lines_of_a_card_change_what_a_lora_for_velocity_draws(results):
    tensors, _ = results("")
    drawn = [tensors[f"lora_velocity-{name}|picture"] for name in ("diffusers", "without")]
    assert not torch.allclose(*drawn, atol=0.01)
