"""The LoRA files of runs and their checkpoints: for diffusers and for ComfyUI, and what they say of the scheduler."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, inject_adapter_in_model
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import lora_file, model
from torch import nn

from datasets_lib.errors import InputError, MissingFileError
from scripts import convert_lora, merge_lora, sample
from trainers.common.lora.files import read_lora
from trainers.common.lora.header import SCHEDULER_KEY
from trainers.common.lora.kohya import OTHER_FILE, remove_earlier
from trainers.common.lora.tensors import FILE_NAME, read_about
from trainers.common.lora.training import AdapterTrainer
from trainers.inference.checkpoint_lora import read_checkpoint_lora
from trainers.inference.saved_run import open_run
from trainers.sd_lora import LoRATrainer

V = {"lora.prediction_type": "v_prediction", "lora.rescale_betas_zero_snr": True}
CHANGES = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


def run_script(monkeypatch, script, *arguments):
    monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
    script.main()


def assert_same_tensors(first, second):
    first, second = load_file(first), load_file(second)
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[key]) for key, value in first.items())


@pytest.fixture(scope="module")
def finished(tmp_path_factory, request):
    """A run with rsLoRA, averaged weights, a trigger word and two checkpoints."""
    from train import train
    from trainers.engine.config.config import load_config

    model("sd1")  # which the config names
    folder = tmp_path_factory.mktemp("runs") / "ink wash"
    options = {"base.output_dir": folder, "base.checkpointing_steps": 3, "base.trigger_word": "sks",
               "lora.use_rslora": True, "lora.rank": 9, "lora.lora_alpha": 5}  # fmt: skip
    train(load_config("configs/tests/lora.json", [f"{name}={value}" for name, value in options.items()]))
    return folder


# two files -----------------------------------------------------------------------------------------------------------


def test_a_run_leaves_a_file_for_diffusers_and_one_for_other_programs(finished):
    assert sorted(path.name for path in finished.glob("*.safetensors")) == ["ink wash.safetensors", FILE_NAME]
    ours, theirs = read_lora(finished), read_lora(finished / "ink wash.safetensors")
    for network, tensors in ours.tensors.items():
        assert all(torch.equal(value, theirs.tensors[network][key]) for key, value in tensors.items())
        assert set(ours.scalings(network).values()) == set(theirs.scalings(network).values()) == {1.0}
    alphas = {value.item() for key, value in load_file(finished / "ink wash.safetensors").items() if "alpha" in key}
    assert alphas == {9.0}


def test_headers_say_what_was_asked_for_and_name_no_path(finished):
    for name in (FILE_NAME, "ink wash.safetensors"):
        about = read_about(finished / name)
        assert {key: about[key] for key in ("rank", "alpha", "use_rslora")} == {
            "rank": "9",
            "alpha": "5",
            "use_rslora": "True",
        }
        assert about["base_model"] == "sd1-2"
        assert not any("/" in value for key, value in about.items() if key != "modelspec.architecture")
    shown = {key: about[key] for key in ("ss_output_name", "ss_sd_model_name", "modelspec.title", "modelspec.trigger_phrase",
                                         "modelspec.prediction_type", "modelspec.resolution", "ss_resolution")}  # fmt: skip
    assert shown == {
        "ss_output_name": "ink wash", "ss_sd_model_name": "sd1-2", "modelspec.title": "ink wash",
        "modelspec.trigger_phrase": "sks", "modelspec.prediction_type": "epsilon", "modelspec.resolution": "32x32",
        "ss_resolution": "(32, 32)",
    }  # fmt: skip
    assert json.loads(about["ss_tag_frequency"]) == {"ink wash": {"sks": 1}}


@pytest.mark.parametrize(
    ("options", "files", "said"),
    [
        ({"lora.lora_formats": ["diffusers"]}, [FILE_NAME], "No file for ComfyUI .*: lora_formats leaves it out"),
        ({"lora.use_dora": True}, [FILE_NAME], "No file for ComfyUI .*: of a DoRA, AUTOMATIC1111 makes another change"),
        (
            {"lora.use_dora": True, "lora.lora_formats": ["diffusers", "kohya"]},
            [FILE_NAME, "run.safetensors"],
            "For ComfyUI",
        ),
    ],
)
def test_when_there_is_one_file_alone(run_in_process, capsys, tmp_path, monkeypatch, options, files, said):
    options = {"base.max_train_steps": 1, "lora.train_text_encoder": False, "lora.learning_rate": 1e-3} | options
    folder = run_in_process("run", "lora", **options)
    assert sorted(path.name for path in folder.glob("*.safetensors")) == sorted(files)
    printed = capsys.readouterr().out
    assert re.search(said, printed)
    command = shlex.split(re.search("python scripts/convert_lora.py .* FOLDER --all.*", printed)[0])
    run_script(monkeypatch, convert_lora, *(tmp_path / "all" if word == "FOLDER" else word for word in command[2:]))
    [made] = (tmp_path / "all").iterdir()
    assert read_lora(made).is_dora == ("lora.use_dora" in options)
    assert_same_tensors(made, folder / ("run.safetensors" if "For ComfyUI" in said else FILE_NAME))


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("pytorch_LoRA_weights", f"{FILE_NAME} is the name of diffusers' file; scripts/convert_lora.py writes one"),
        ("n" * 201, "the name of base.output_dir has more than 200 bytes"),
    ],
)
def test_names_of_folders_that_cannot_be_a_files(run_in_process, capsys, name, problem):
    folder = run_in_process(name, "lora", **{"base.max_train_steps": 1})
    assert [path.name for path in folder.glob("*.safetensors")] == [FILE_NAME]
    assert any("lora_A" in key for key in load_file(folder / FILE_NAME))  # in diffusers' format
    assert f"No file for ComfyUI and AUTOMATIC1111 was written: {problem}" in capsys.readouterr().out


def test_a_run_that_goes_on_leaves_no_older_lora_by_another_name(run_in_process):
    steps = {"base.max_train_steps": 1, "base.resume_from_checkpoint": "latest"}
    folder = run_in_process("first", "lora", **steps)
    mine = shutil.copy(folder / "first.safetensors", folder / "mine.safetensors")
    renamed = folder.rename(folder.with_name("second"))
    run_in_process("second", "lora", **steps)
    found = ["mine.safetensors", FILE_NAME, "second.safetensors"]
    assert sorted(path.name for path in renamed.glob("*.safetensors")) == found
    run_in_process("second", "lora", **steps, **{"lora.lora_formats": ["diffusers"]})
    assert sorted(path.name for path in renamed.glob("*.safetensors")) == [Path(mine).name, FILE_NAME]


@pytest.mark.parametrize("name", ["../mine.safetensors", "config.yaml", FILE_NAME, ""])
def test_no_other_file_is_taken_for_an_older_lora(tmp_path, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "mine.safetensors").touch()
    (tmp_path / "run" / "config.yaml").touch()
    save_file({}, tmp_path / "run" / FILE_NAME, metadata={OTHER_FILE: name})
    before = sorted(tmp_path.rglob("*"))
    remove_earlier(tmp_path / "run", "run.safetensors")
    assert sorted(tmp_path.rglob("*")) == before


def test_the_format_of_diffusers_is_always_written(tiny_config):
    from trainers.engine.config.config import load_config

    with pytest.raises(InputError, match="lora_formats.*must contain diffusers, whose file scripts and load_lora_w"):
        load_config(tiny_config("lora", **{"lora.lora_formats": ["kohya"]}))


# checkpoints ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["kohya", "diffusers"])
def test_the_last_checkpoint_is_what_the_run_exported(finished, tmp_path, to):
    convert_lora.convert(finished / "checkpoint-6", tmp_path / "ink wash.safetensors", to)
    exported = finished / (FILE_NAME if to == "diffusers" else "ink wash.safetensors")
    assert_same_tensors(tmp_path / "ink wash.safetensors", exported)
    mine, theirs = read_about(tmp_path / "ink wash.safetensors"), read_about(exported)
    assert theirs.keys() - mine.keys() == ({OTHER_FILE} if to == "diffusers" else set())
    assert mine.keys() <= theirs.keys()
    assert {key for key in mine if mine[key] != theirs[key]} <= {"lora_adapter_metadata"}  # targets by modules' names


def test_all_checkpoints_at_once_as_the_end_of_the_run_says(finished, tmp_path, monkeypatch):
    run_script(monkeypatch, convert_lora, finished, tmp_path / "epochs", "--all")
    names = ["ink wash-step00000003.safetensors", "ink wash-step00000006.safetensors"]
    assert sorted(path.name for path in (tmp_path / "epochs").iterdir()) == names
    (tmp_path / "again").mkdir()
    shutil.copy(tmp_path / "epochs" / names[1], tmp_path / "again")
    with pytest.raises(SystemExit, match=f"error: .*{names[1]}: is there already; choose another place, or remove it"):
        run_script(monkeypatch, convert_lora, finished, tmp_path / "again", "--all")
    assert [path.name for path in (tmp_path / "again").iterdir()] == names[1:]  # the first one is not written
    with pytest.raises(SystemExit, match=f"error: .*{FILE_NAME}: no folder can be made there .*; choose another place"):
        run_script(monkeypatch, convert_lora, finished, finished / FILE_NAME, "--all")
    first, last = (load_file(tmp_path / "epochs" / name) for name in names)
    assert any(not torch.equal(value, last[key]) for key, value in first.items())
    raw = tmp_path / "raw.safetensors"
    convert_lora.convert(finished / "checkpoint-6", raw, weights="raw")
    trained = load_file(finished / "checkpoint-6" / "unet" / "trainable.safetensors")
    key = next(key for key in trained if "lora_A" in key)
    name = "lora_unet_" + key.removesuffix(".lora_A.default.weight").replace(".", "_")
    assert torch.equal(load_file(raw)[f"{name}.lora_down.weight"], trained[key])
    assert not torch.equal(last[f"{name}.lora_down.weight"], trained[key])


def test_ctrl_c_among_checkpoints_keeps_what_is_written(finished, tmp_path, monkeypatch, capsys):
    written, original = [], convert_lora.write_kohya

    def write(path, lora, title):
        original(path, lora, title)
        written.append(title)
        if len(written) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(convert_lora, "write_kohya", write)
    with pytest.raises(SystemExit) as ended:
        run_script(monkeypatch, convert_lora, finished, tmp_path / "epochs", "--all")
    assert ended.value.code == 130
    assert capsys.readouterr().err.endswith("\ninterrupted\n")
    assert [path.stem for path in (tmp_path / "epochs").iterdir()] == written[:1]


def test_a_checkpoint_without_its_base_and_a_run_without_its_end(finished, tmp_path, capsys):
    run = tmp_path / "moved"
    run.mkdir()
    (run / "checkpoint-6").symlink_to(finished / "checkpoint-6")
    state = json.loads((finished / "checkpoint-6" / "state.json").read_text())
    assert state["config"]["lora"]["pretrained_model_name_or_path"] == "outputs/tests/sd1-2"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)  # where the base's relative path leads nowhere
        patch.setenv("HF_HUB_OFFLINE", "1")
        convert_lora.convert(run / "checkpoint-6", tmp_path / "ink wash.safetensors")
    assert "NOTE: the file does not say what its base model predicts: " in capsys.readouterr().err
    assert_same_tensors(tmp_path / "ink wash.safetensors", finished / "ink wash.safetensors")


def test_a_checkpoint_is_no_lora_file_and_the_message_names_what_makes_one(finished, tmp_path, monkeypatch):
    shutil.copytree(finished / "checkpoint-6", tmp_path / "run" / "checkpoint-6")
    for folder in (finished / "checkpoint-6", tmp_path / "run"):
        message = f"no file .*; python scripts/convert_lora.py {shlex.quote(str(folder))} FILE.safetensors makes it of a checkpoint"
        with pytest.raises(SystemExit, match=message):
            run_script(monkeypatch, merge_lora, model("sd1"), tmp_path / "merged", "--lora", folder)
    convert_lora.convert(tmp_path / "run", tmp_path / "newest.safetensors")
    assert_same_tensors(tmp_path / "newest.safetensors", finished / "ink wash.safetensors")


def test_of_a_run_that_goes_on_the_newest_checkpoint_is_taken(finished, of_v, tmp_path):
    shutil.copytree(finished / "checkpoint-3", tmp_path / "run" / "checkpoint-3")  # of 6 steps
    shutil.copy(of_v / FILE_NAME, tmp_path / "run")  # as if of before
    for name, source in {"run": tmp_path / "run", "checkpoint": finished / "checkpoint-3"}.items():
        convert_lora.convert(source, tmp_path / f"{name}.safetensors")
    assert_same_tensors(tmp_path / "run.safetensors", tmp_path / "checkpoint.safetensors")
    shutil.rmtree(tmp_path / "run" / "checkpoint-3")
    shutil.copytree(finished / "checkpoint-6", tmp_path / "run" / "checkpoint-6")  # the last one
    convert_lora.convert(tmp_path / "run", tmp_path / "finished.safetensors", "diffusers")
    assert_same_tensors(tmp_path / "finished.safetensors", of_v / FILE_NAME)


def test_checkpoints_that_hold_no_lora(run_in_process, of_v, tmp_path):
    folder = run_in_process("other", "ddpm", **{"base.max_train_steps": 1})
    output = tmp_path / "out.safetensors"
    with pytest.raises(InputError, match="is of task ddpm, which trains no LoRA; give a run of lora or lcm_lora"):
        convert_lora.convert(folder, output)
    with pytest.raises(MissingFileError, match="holds no checkpoints; --all needs a run's folder with some"):
        convert_lora.convert_all(model("sd1"), tmp_path)
    with pytest.raises(InputError, match="has no averaged weights, its run had use_ema: false; ask for raw"):
        convert_lora.convert(of_v / "checkpoint-2", output, weights="ema")
    with pytest.raises(MissingFileError, match="no file .*; give a LoRA as .safetensors, or a folder with"):
        convert_lora.convert(tmp_path, output)
    assert not output.exists()


def test_checkpoints_of_another_run_and_without_a_lora(finished, tmp_path):
    saved = open_run(finished / "checkpoint-6")
    with pytest.raises(InputError, match=f"{tmp_path}: holds no LoRA"):
        read_checkpoint_lora(saved._replace(checkpoint=tmp_path))
    (tmp_path / "unet").mkdir()
    save_file({"conv_in.weight": torch.ones(1)}, tmp_path / "unet" / "trainable.safetensors")
    message = "unet: conv_in.weight is no tensor of a LoRA; the checkpoint is of another run"
    with pytest.raises(InputError, match=message):
        read_checkpoint_lora(saved._replace(checkpoint=tmp_path), "raw")


def test_a_module_without_a_name_in_kohyas_format():
    network = inject_adapter_in_model(LoraConfig(target_modules=["odd"]), nn.ModuleDict({"odd": nn.Linear(2, 2)}))
    trainer = SimpleNamespace(config=SimpleNamespace(lora_formats=None, use_dora=False), unwrapped={"unet": network})
    assert AdapterTrainer.kohya_problem(trainer) == "kohya's format has no name for unet.odd"


@pytest.mark.parametrize("text", ["[", "[]", "{}", "base: {}", "lora: 3", "{lora: {}, lcm_lora: {}}"])
def test_a_runs_folder_whose_configuration_is_none(finished, tmp_path, text):
    shutil.copy(finished / FILE_NAME, tmp_path)
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(InputError, match="config.yaml: is no configuration of a run"):
        LoRATrainer.load_pipeline(tmp_path)


# the scheduler -------------------------------------------------------------------------------------------------------


def pixels(folder):
    return np.stack([np.asarray(Image.open(path)) for path in sorted((folder / "samples").glob("*.png"))]).astype(int)


@pytest.fixture(scope="module")
def of_v(tmp_path_factory):
    """A run on a base that predicts noise, whose adapter predicts v with zero terminal SNR."""
    from train import train
    from trainers.engine.config.config import load_config

    model("sd1")
    folder = tmp_path_factory.mktemp("runs") / "v"
    options = {"base.output_dir": folder, "base.max_train_steps": 2, "lora.use_ema": False} | V
    train(load_config("configs/tests/lora.json", [f"{name}={value}" for name, value in options.items()]))
    return folder


def test_a_lora_that_predicts_v_draws_the_same_with_its_base_as_in_its_run(of_v, tmp_path, monkeypatch):
    asked = ["--prompt", "a photo of a cat", "--steps", "2", "--guidance", "2", "--device", "cpu"]
    run_script(monkeypatch, sample, of_v, *asked, "--output-dir", tmp_path / "run")
    for name, lora in {"folder": of_v, "kohya": of_v / "v.safetensors"}.items():
        run_script(monkeypatch, sample, model("sd1"), *asked, "--lora", lora, "--output-dir", tmp_path / name)
        assert np.abs(pixels(tmp_path / "run") - pixels(tmp_path / name)).max() <= 1
    run_script(monkeypatch, sample, model("sd1"), *asked, "--lora", f"{of_v}:0", "--output-dir", tmp_path / "off")
    run_script(monkeypatch, sample, model("sd1"), *asked, "--output-dir", tmp_path / "base")
    assert np.array_equal(pixels(tmp_path / "off"), pixels(tmp_path / "base"))
    assert np.abs(pixels(tmp_path / "run") - pixels(tmp_path / "base")).mean() > 1
    columns = [*asked, "--lora-scales", "0,1", "--output-dir"]
    run_script(monkeypatch, sample, model("sd1"), *columns, tmp_path / "with base", "--lora", of_v)
    run_script(monkeypatch, sample, of_v, *columns, tmp_path / "of run")
    for folder in (tmp_path / "with base", tmp_path / "of run"):
        for column, wanted in {"weight_0": "base", "weight_1": "run"}.items():
            drawn = np.asarray(Image.open(folder / column / "00000.png")).astype(int)
            assert np.abs(drawn - pixels(tmp_path / wanted)[0]).max() <= 1


def test_a_run_beside_a_lora_that_predicts_v_takes_its_scheduler_where_it_acts(finished, of_v, tmp_path, monkeypatch):
    asked = ["--prompt", "a photo of a cat", "--steps", "2", "--guidance", "2", "--device", "cpu", "--output-dir"]
    run_script(monkeypatch, sample, model("sd1"), *asked, tmp_path / "base")
    run_script(monkeypatch, sample, finished, *asked, tmp_path / "both", "--lora", of_v, "--lora-scales", "0,1")
    both = [tmp_path / "both" / column / "00000.png" for column in ("scale_0", "scale_1")]
    off, on = (np.asarray(Image.open(file)).astype(int) for file in both)
    assert np.abs(off - pixels(tmp_path / "base")[0]).max() <= 1
    two = ["--lora", of_v, "--lora", finished]
    run_script(monkeypatch, sample, model("sd1"), *asked, tmp_path / "two", *two)
    assert np.abs(on - pixels(tmp_path / "two")[0]).max() <= 1
    run_script(monkeypatch, sample, of_v, *asked, tmp_path / "other", "--lora", finished, "lora.lora_scale=0")
    run_script(monkeypatch, sample, model("sd1"), *asked, tmp_path / "alone", "--lora", finished)
    assert np.abs(pixels(tmp_path / "other") - pixels(tmp_path / "alone")).max() <= 1
    run_script(monkeypatch, sample, model("sd1"), *asked, tmp_path / "one off", "--lora", f"{of_v}:0", two[2], two[3])
    assert np.array_equal(pixels(tmp_path / "one off"), pixels(tmp_path / "alone"))


def test_the_start_the_header_and_the_lines_say_so(of_v, run_in_process, capsys):
    assert json.loads(read_about(of_v)[SCHEDULER_KEY]) == CHANGES
    assert read_about(of_v / "v.safetensors")["ss_zero_terminal_snr"] == "True"
    assert read_about(of_v / "v.safetensors")["modelspec.prediction_type"] == "v"
    run_in_process("again", "lora", **{"base.max_train_steps": 1} | V)
    printed = capsys.readouterr().out
    assert (
        "NOTE: Unlike the base model the LoRA is for prediction_type: v_prediction, rescale_betas_zero_snr: True"
        in printed
    )
    lines = printed.partition("To load and sample it:\n\n")[2].partition("pipeline.load_lora_weights")[0]
    found = {}
    exec("\n".join(line.removeprefix("  ") for line in lines.splitlines()), found)  # the lines that the user is shown
    config = found["pipeline"].scheduler.config
    assert {name: config[name] for name in CHANGES} == CHANGES
    card = (of_v / "README.md").read_text()
    assert "Unlike the base model the LoRA is for prediction_type: v_prediction" in card
    assert 'prediction_type="v_prediction"' in card or "prediction_type='v_prediction'" in card


def test_loading_and_merging_take_the_scheduler_along(of_v, tmp_path, monkeypatch):
    run_script(monkeypatch, merge_lora, model("sd1"), tmp_path / "merged", "--lora", of_v)
    merged, loaded = DiffusionPipeline.from_pretrained(tmp_path / "merged"), LoRATrainer.load_pipeline(of_v)
    for pipeline in (merged, loaded):
        assert {name: pipeline.scheduler.config[name] for name in CHANGES} == CHANGES


def test_an_ordinary_lora_changes_no_scheduler(finished, tmp_path, monkeypatch):
    assert SCHEDULER_KEY not in read_about(finished)
    assert LoRATrainer.load_pipeline(finished).scheduler.config.prediction_type == "epsilon"
    run_script(monkeypatch, merge_lora, model("sd2"), tmp_path / "sd2", "--lora", lora_file(tmp_path, "sd2"))
    assert DiffusionPipeline.from_pretrained(tmp_path / "sd2").scheduler.config.prediction_type == "v_prediction"


@pytest.mark.parametrize("text", ["[", "[]", '{"beta_end": 1}', '{"prediction_type": "sample"}', "null"])
def test_a_header_that_asks_for_something_else(of_v, tmp_path, monkeypatch, text):
    save_file(load_file(of_v / FILE_NAME), tmp_path / FILE_NAME, metadata=read_about(of_v) | {SCHEDULER_KEY: text})
    with pytest.raises(
        SystemExit, match="scheduler_changes = .* in its header must be a JSON object with some of predict"
    ):
        run_script(monkeypatch, merge_lora, model("sd1"), tmp_path / "merged", "--lora", tmp_path)


def test_loras_that_need_different_schedulers(of_v, tmp_path, monkeypatch):
    other = json.dumps({"prediction_type": "epsilon"})
    save_file(load_file(of_v / FILE_NAME), tmp_path / FILE_NAME, metadata=read_about(of_v) | {SCHEDULER_KEY: other})
    both = ["--lora", of_v, "--lora", tmp_path]
    message = "was trained with prediction_type: epsilon, and another LoRA with v_prediction; give one of them a weight"
    with pytest.raises(SystemExit, match=message):
        run_script(monkeypatch, merge_lora, model("sd1"), tmp_path / "merged", *both)
    run_script(monkeypatch, merge_lora, model("sd1"), tmp_path / "merged", "--lora", of_v, "--lora", f"{tmp_path}:0")


def test_the_end_of_a_run_names_the_command_and_the_card_the_file(run_in_process, capsys):
    folder = run_in_process("my run", "lora", **{"base.checkpointing_steps": 3})
    printed = capsys.readouterr().out
    assert "For ComfyUI, AUTOMATIC1111, Forge and kohya's tools: my run.safetensors" in printed
    assert f"python scripts/convert_lora.py '{folder}' FOLDER --all" in printed
    card = (folder / "README.md").read_text()
    assert "my run.safetensors" in card
    assert "--all" not in card
