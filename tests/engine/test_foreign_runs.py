"""Runs and checkpoints that somebody sent: they run no code, lead to no other file, and what is wrong in them is said."""

from __future__ import annotations

import ast
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from foreign_runs import EVIL, NAME, evil_copy
from marks import slow
from repository import ROOT, tiny
from run_folders import steps_of
from script_calls import run_script

from datasets_lib.file_hashes import sha256
from scripts import evaluate, replay, sample, shard, sweep
from train import main, train
from trainers.engine.checkpoint.manifest import DamagedCheckpoint, verify
from trainers.engine.config.config import ConfigError, load_config
from trainers.engine.run.files import append_line

CODE = f"{NAME}:{{0}}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("foreign") / "run"
    options = [f"base.output_dir={folder}", "base.checkpointing_steps=3", "base.max_train_steps=6"]
    return train(load_config(tiny("conditional_ddpm"), options))


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    with evil_copy(trained, tmp_path, monkeypatch) as folder:
        yield folder


def reseal(checkpoint):
    """Makes the manifest fit what is in the folder now."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != "manifest.json")
    entries = {str(path.relative_to(checkpoint)): [path.stat().st_size, sha256(path)] for path in files}
    (checkpoint / "manifest.json").write_text(json.dumps(entries))


def change_state(checkpoint, change):
    state = json.loads((checkpoint / "state.json").read_text())
    change(state)
    (checkpoint / "state.json").write_text(json.dumps(state))
    reseal(checkpoint)


def name_code(folder, option, value):
    """Writes an option into the run's own files: its configuration, and the states of its checkpoints."""
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(re.sub(f"  {option}: .*", lambda _: f"  {option}: {value}", text))
    for step in steps_of(folder):
        change_state(folder / f"checkpoint-{step}", lambda state: state["config"]["base"].update({option: value}))


# --- code


SCRIPTS = {
    "sample": (sample, lambda run: [run]),
    "sample, the pipeline": (sample, lambda run: [run, *map(shutil.rmtree, run.glob("checkpoint-*"))][:1]),
    "sample, a checkpoint": (sample, lambda run: [run / "checkpoint-6"]),
    "evaluate": (evaluate, lambda run: [run, "--features", "none", "--number", 5]),
    "replay": (replay, lambda run: [run, 2]),
    "sweep": (sweep, lambda run: [run, "--vary", "steps=2", "--output", run.parent / "table"]),
    "shard": (shard, lambda run: [run / "config.yaml", "--output-dir", run.parent / "shards"]),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_trainer_class_named_by_a_run_is_not_imported(run, name):
    name_code(run, "trainer_class", CODE.format("T"))
    script, arguments = SCRIPTS[name]
    expected = "base.trainer_class = evil_run.evil:T: names code that is not diffloop's, in .*; read it, then allow it with --trust-code"
    with pytest.raises(SystemExit, match=expected):
        run_script(script, *arguments(run))


@pytest.mark.parametrize("value", [CODE.format("build"), "${base.output_dir}"])
def test_a_data_set_named_by_a_run_is_not_imported(run, value):
    """Also one that only appears when references are resolved."""
    name_code(run, "dataset", f'"{value}"')
    name_code(run, "output_dir", CODE.format("build"))
    for step in steps_of(run):
        change_state(run / f"checkpoint-{step}", lambda state: state["config"]["base"].update(dataset=value))
    for script, arguments in (SCRIPTS["evaluate"], SCRIPTS["replay"]):
        with pytest.raises(SystemExit, match='base.dataset = "?evil_run.evil:build"?: names code that is not diffloop'):
            run_script(script, *arguments(run))
    run_script(sample, run, "--number", 2, "--steps", 2)  # which needs no data


def test_train_takes_no_code_from_a_runs_configuration(run, capsys):
    name_code(run, "trainer_class", CODE.format("T"))
    again = [str(run / "config.yaml"), "base.resume_from_checkpoint=latest"]
    assert main(again) == 2
    assert "names code that is not diffloop's" in capsys.readouterr().err


def test_a_checkpoint_that_names_code_is_only_compared(run, trained, capsys):
    """The user's own configuration decides what trains; the other one is a change that is refused."""
    name_code(run, "trainer_class", CODE.format("T"))
    options = [f"base.output_dir={run}", "base.checkpointing_steps=3", "base.resume_from_checkpoint=latest"]
    assert main([str(tiny("conditional_ddpm")), *options]) == 1
    assert 'base.trainer_class: "evil_run.evil:T" -> null' in capsys.readouterr().err


MINE = "from trainers.conditional_ddpm import ConditionalDDPMTrainer\nclass T(ConditionalDDPMTrainer): pass\n"


@pytest.mark.parametrize("allowed", [["--trust-code"], ["base.trainer_class=evil_run.evil:T"]])
def test_code_is_imported_if_the_user_says_so(run, allowed, capsys):
    (run / "evil.py").write_text(MINE)
    name_code(run, "trainer_class", CODE.format("T"))
    run_script(sample, run, "--steps", 2, "--number", 2, *allowed)
    said = capsys.readouterr().err.count("names the code base.trainer_class = evil_run.evil:T, which is imported")
    assert said == (allowed == ["--trust-code"])


def test_a_folder_without_init_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "mine.py").write_text(EVIL)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="the folder outputs has no __init__.py"):
        load_config(tiny("ddpm"), ["base.trainer_class=outputs.mine:T"])
    assert not (tmp_path / "outputs" / "ran").exists()


def test_a_name_without_a_colon_is_not_imported(run):
    with pytest.raises(ConfigError, match=r"must be an importable package.module:Class \(it has no colon\)"):
        load_config(tiny("ddpm"), ["base.trainer_class=evil_run.evil"])


class Overwrites(torch.nn.Module):
    """Measures pictures, and fills a file of the user's with zeros."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        mine = torch.from_file(self.path, shared=True, size=4, dtype=torch.uint8)
        mine.fill_(0)
        return images.float().flatten(1) + mine.sum()


@pytest.mark.parametrize("option", ["--judge", "--features"])
def test_torchscript_is_not_run_without_trust(run, tmp_path, option, capsys):
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    torch.jit.script(Overwrites(str(victim))).save(tmp_path / "judge.pt")
    features = [] if option == "--features" else ["--features", "none"]
    arguments = [run, "--number", 5, "--steps", 2, *features, option, tmp_path / "judge.pt"]
    with pytest.raises(SystemExit, match=rf"{option} .*judge.pt: is a program \(TorchScript\), which can do anything"):
        run_script(evaluate, *arguments)
    assert victim.read_bytes() == b"mine"
    run_script(evaluate, *arguments, "--trust-code")
    assert victim.read_bytes() == bytes(4)
    assert "judge.pt is a program (TorchScript), which is run" in capsys.readouterr().err


def test_torchscript_of_an_own_configuration_needs_trust_too(tiny_config, tmp_path, capsys):
    (tmp_path / "f.pt").write_bytes(b"x")
    path = tiny_config(**{"base.eval_steps": 3, "base.eval_features": str(tmp_path / "f.pt")})
    assert main([str(path)]) == 2
    assert "base.eval_features" in (error := capsys.readouterr().err)
    assert "is a program (TorchScript)" in error


# --- state.json and manifest.json


def at(*keys):
    """change(value) -> a change of the state there."""

    def put(value):
        def change(state):
            place = state
            for key in keys[:-1]:
                place = place[key]
            place[keys[-1]] = value

        return change

    return put


STATES = {
    "step negative": (at("step")(-5), "step = -5: must be an integer in"),
    "step of another folder": (at("step")(5), "step = 5: must be 6, as the folder's name says"),
    "step NaN": (at("step")(float("nan")), "step = nan: must be"),
    "step a text": (at("step")("6"), "step = 6: must be"),
    "step null": (at("step")(None), "step = None: must be"),
    "step a fraction": (at("step")(6.5), "step = 6.5: must be"),
    "step true": (at("step")(True), "step = True: must be"),
    "slot huge": (at("slot")(10**18), "slot = 1000000000000000000: cannot be that of step 6"),
    "slot negative": (at("slot")(-1), "slot = -1: must be"),
    "slot too small": (at("slot")(5), "slot = 5: cannot be that of step 6"),
    "total_steps": (at("total_steps")(-1), "total_steps = -1: must be"),
    "total_steps too small": (at("total_steps")(5), "total_steps = 5: must be at least step 6"),
    "global_batch_size": (at("global_batch_size")(0), "global_batch_size = 0: must be"),
    "num_examples": (at("num_examples")("many"), "num_examples = many: must be"),
    "fingerprint": (at("fingerprint")(7), "fingerprint = 7: must be"),
    "label_names": (at("label_names")([1, 2]), "label_names = "),
    "stream": (at("stream")([{"turn": 0, "readers": []}]), r"lacks stream\[0\].skipped_before"),
    "meter a list": (at("meter")([]), "meter = "),
    "meter of texts": (at("meter")({"names": ["loss"], "windows": [[["a", "b"]]]}), "meter.windows = "),
    "meter of another shape": (
        at("meter")({"names": ["loss"], "windows": [[]]}),
        "must hold two numbers for each of 1",
    ),
    "divergence missing": (lambda state: state.pop("divergence"), "lacks divergence"),
    "divergence of texts": (at("divergence")({"skipped_in_a_row": "x"}), "divergence.skipped_in_a_row = x: must be"),
    "config a list": (at("config")([]), "config = "),
    "config empty": (at("config")({}), "must hold two sections"),
    "config without base": (at("config")({"ddpm": {}, "dit": {}}), "must hold two sections"),
    "a section of text": (at("config", "base")("x"), "config = "),
    "scaler": (at("scaler")({"scale": "x"}), "scaler.scale = x: must be a number"),
    "scaler infinite": (at("scaler")({"scale": float("inf")}), "scaler.scale = inf: must be a number"),
}


@pytest.mark.parametrize("name", STATES)
def test_a_state_that_no_run_writes_is_a_damaged_checkpoint(run, name, capsys):
    """`latest` takes the one before."""
    change, expected = STATES[name]
    change_state(run / "checkpoint-6", change)
    with pytest.raises(DamagedCheckpoint, match=expected):
        verify(run / "checkpoint-6")
    with pytest.raises(SystemExit, match=expected):
        run_script(sample, run)


def test_latest_goes_on_from_the_checkpoint_before_a_strange_one(run, capsys):
    change_state(run / "checkpoint-6", at("divergence")(None))
    options = [f"base.output_dir={run}", "base.checkpointing_steps=3", "base.resume_from_checkpoint=latest"]
    assert main([str(tiny("conditional_ddpm")), *options]) == 0
    output = capsys.readouterr().out
    assert "WARNING: skipping a damaged checkpoint" in output
    assert "resumed at 3" in output


def test_an_option_of_another_type_in_a_state(run, capsys):
    for step in (3, 6):
        change_state(run / f"checkpoint-{step}", at("config", "conditional_ddpm", "learning_rate")("fast"))
    options = [f"base.output_dir={run}", "base.checkpointing_steps=3", "base.resume_from_checkpoint=latest"]
    options += ["base.max_train_steps=9", "conditional_ddpm.lr_scheduler=cosine"]
    assert main([str(tiny("conditional_ddpm")), *options]) == 1
    error = capsys.readouterr().err
    assert "state.json has conditional_ddpm.learning_rate = fast: must be a number above 0" in error
    assert "Traceback" not in error


MANIFESTS = {
    "a list": "[]",
    "nested": "[" * 200_000,
    "a number of 6,000 digits": '{"state.json": [' + "9" * 6_000 + ', ""]}',
    "sizes of text": '{"state.json": ["1", ""]}',
    "NUL": '{"state\\u0000.json": [1, ""]}',
    "escapes": '{"\\u001b[2J.json": [1, ""]}',
    "three values": '{"state.json": [1, "", 2]}',
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_that_no_run_writes(run, name):
    (run / "checkpoint-6" / "manifest.json").write_text(MANIFESTS[name])
    with pytest.raises(DamagedCheckpoint) as caught:
        verify(run / "checkpoint-6")
    assert "\x1b" not in str(caught.value)


SPECIAL = {
    "a link": lambda path: path.symlink_to("/dev/zero"),
    "a pipe": lambda path: os.mkfifo(path),
    "a folder": lambda path: path.mkdir(),
    "20 GB": lambda path: os.truncate((path.write_text("") and path) or path, 20 << 30),
}


@pytest.mark.parametrize("file", ["manifest.json", "state.json", "unet/config.json"])
@pytest.mark.parametrize("kind", SPECIAL)
def test_files_of_a_checkpoint_that_are_none(run, file, kind):
    path = run / "checkpoint-6" / file
    path.unlink()
    SPECIAL[kind](path)
    with pytest.raises(DamagedCheckpoint):
        verify(run / "checkpoint-6")


# --- links


@pytest.mark.parametrize(
    "name", ["config.yaml", "metrics.jsonl", "README.md", "samples", "logs", "logs/diffloop", "logs/wandb", ".lock"]
)
def test_a_link_in_a_run_folder_is_refused_at_the_start(run, tmp_path, name, capsys):
    victim = tmp_path / "victim"
    victim.mkdir() if name.startswith(("samples", "logs")) else victim.write_text("mine")
    path = run / name
    shutil.rmtree(path, ignore_errors=True)
    path.unlink(missing_ok=True)
    path.symlink_to(victim)
    options = [f"base.output_dir={run}", "base.checkpointing_steps=3", "base.resume_from_checkpoint=latest"]
    assert main([str(tiny("conditional_ddpm")), *options]) == 1
    assert f"{path} is a link; replace it by what it leads to" in capsys.readouterr().err
    assert not list(victim.iterdir()) if victim.is_dir() else victim.read_text() == "mine"


@pytest.mark.parametrize("kind", ["hard link", "pipe", "folder"])
def test_a_lock_that_is_no_file_of_its_own(run, tmp_path, kind, capsys):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (run / ".lock").unlink()
    {"hard link": lambda path: path.hardlink_to(victim), "pipe": os.mkfifo, "folder": os.mkdir}[kind](run / ".lock")
    options = [f"base.output_dir={run}", "base.checkpointing_steps=3", "base.resume_from_checkpoint=latest"]
    assert main([str(tiny("conditional_ddpm")), *options]) == 1
    assert ".lock in it is not a file of its own; remove it" in capsys.readouterr().err
    assert victim.read_text() == "mine"


@pytest.mark.parametrize("name", [".README.md", ".metrics.jsonl", "replay-step-2.png", "README.md.tmp"])
def test_links_with_names_that_writers_use_are_not_followed(run, tmp_path, name, capsys):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (run / name).symlink_to(victim)
    options = [f"base.output_dir={run}", "base.checkpointing_steps=3", "base.resume_from_checkpoint=latest"]
    assert main([str(tiny("conditional_ddpm")), *options]) == 0
    run_script(replay, run, 2)
    assert victim.read_text() == "mine"
    assert (run / "replay-step-2.png").is_file()
    assert not (run / "replay-step-2.png").is_symlink()


def test_a_checkpoint_is_not_written_through_a_link(run, tmp_path, capsys):
    """The name of the next checkpoint leads elsewhere: the save fails, and says so, instead of being left out."""
    (tmp_path / "victim").mkdir()
    (run / "checkpoint-9").symlink_to(tmp_path / "victim")
    options = [f"base.output_dir={run}", "base.checkpointing_steps=3", "base.resume_from_checkpoint=latest"]
    assert main([str(tiny("conditional_ddpm")), *options, "base.max_train_steps=9"]) == 1
    assert "checkpoint-9 could not be written" in capsys.readouterr().err
    assert not list((tmp_path / "victim").iterdir())


# --- logs and indices


@pytest.mark.parametrize(
    "line",
    [
        '{"step": "6", "loss": 1}',
        '{"step": NaN}',
        "[" * 100_000,
        '{"step": 1, "loss": {"a": 1}}',
        '{"step": 2, "\\u001b]0;PWN\\u0007": "x"}',
    ],
)
def test_strange_lines_of_metrics_are_left_out(run, line, capsys):
    with (run / "metrics.jsonl").open("a") as file:
        file.write(f"{line}\n")
    options = [f"base.output_dir={run}", "base.checkpointing_steps=3", "base.resume_from_checkpoint=latest"]
    assert main([str(tiny("conditional_ddpm")), *options]) == 0
    captured = capsys.readouterr()
    assert "\x1b]" not in captured.out + captured.err


@pytest.mark.parametrize("index", ["[]", '{"id2label": [1]}', '{"id2label": {"a": "b"}}', "{", "[" * 100_000])
def test_an_index_of_a_pipeline_that_is_none(run, index):
    for step in steps_of(run):
        shutil.rmtree(run / f"checkpoint-{step}")
    (run / "model_index.json").write_text(index)
    with pytest.raises(SystemExit, match="model_index.json: (is not the index of a pipeline|cannot be read as JSON)"):
        run_script(sample, run)


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 2}',
        '{"step": 2, "slots": [0, 1e18], "micro_batch_size": 4}',
        '{"step": 2, "slots": [0, 1000000000000], "micro_batch_size": 4}',
        '{"step": 2, "slots": "x", "micro_batch_size": 4}',
    ],
)
def test_a_skipped_step_that_no_run_writes(run, line):
    (run / "skipped_steps.jsonl").write_text(line + "\n")
    with pytest.raises(SystemExit, match="skipped_steps.jsonl: .*: is not a line that a run writes; remove it"):
        run_script(replay, run, 2)


def test_a_key_cannot_print_a_line_of_its_own(tmp_path, capsys):
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"base": {"a\nerror: fake \x1b[2J": 1}, "ddpm": {"x\ry": 2}}))
    assert main([str(path)]) == 2
    error = capsys.readouterr().err
    assert "base.a\\nerror: fake \\x1b[2J = 1: unknown option" in error
    assert "ddpm.x\\ry = 2: unknown option" in error
    path.write_text(json.dumps({"base": {}, "t\nerror: fake": {}}))
    assert main([str(path)]) == 2
    assert "t\\nerror: fake: no such task" in capsys.readouterr().err


# --- what goes out


def test_a_card_holds_no_path_of_the_machine(run_in_process, tmp_path):
    folder = run_in_process("`x` <b>y", **{"base.cache_dir": None, "base.encoder_cache_dir": None})
    card = (folder / "README.md").read_text()
    assert str(tmp_path) not in card
    assert "# `x` &lt;b&gt;y" in card
    assert 'from_pretrained("`x` <b>y")' in card


def test_weights_that_are_not_finite_are_not_exported(run, capsys):
    """A finished run whose checkpoint was changed: nothing is trained, and its pipeline would be written again."""
    from safetensors.torch import load_file, save_file

    for file in run.glob("checkpoint-*/unet*/diffusion_pytorch_model.safetensors"):
        tensors = load_file(file)
        next(iter(tensors.values()))[0] = float("nan")
        save_file(tensors, file, metadata={"format": "pt"})
        reseal(file.parents[1])
    options = [f"base.output_dir={run}", "base.checkpointing_steps=3", "base.resume_from_checkpoint=latest"]
    before = sha256(run / "unet" / "diffusion_pytorch_model.safetensors")
    assert main([str(tiny("conditional_ddpm")), *options]) == 1
    assert "the pipeline is not written: unet." in capsys.readouterr().err
    assert sha256(run / "unet" / "diffusion_pytorch_model.safetensors") == before


def test_what_a_run_was_logged_as_does_not_write_into_its_card(run, capsys):
    """Names of metrics and of pictures in the folder of an earlier start."""
    (run / "metrics.jsonl").open("a").write(json.dumps({"step": 6, "a | b\n# Fake\n": 1.5}) + "\n")
    (run / "metrics.jsonl").open("a").write(json.dumps({"step": 6, "huge": 10**400}) + "\n")
    (run / "samples" / "](x) <b>-step-000006.png").write_bytes(b"")
    (run / "samples" / "draw-step-000006.png").symlink_to("/etc/passwd")
    options = [f"base.output_dir={run}", "base.checkpointing_steps=3", "base.resume_from_checkpoint=latest"]
    assert main([str(tiny("conditional_ddpm")), *options]) == 0
    card = (run / "README.md").read_text()
    for text in ("Fake", "<b>", "draw-step", "huge"):
        assert text not in card


def test_left_overs_and_what_a_folder_holds_are_shown_escaped(run, capsys):
    (run / ".tmp-checkpoint-9-\x1b[2J").mkdir()
    (run / ".tmp-0123456789abcdef").mkdir()  # no file of ours, and left alone
    (run / "samples" / ".tmp-0123456789abcdef").write_text("left by a kill")
    (run / "a\nerror: fake").mkdir()
    config, folder = str(tiny("conditional_ddpm")), f"base.output_dir={run}"
    assert main([config, folder]) == 1
    captured = capsys.readouterr()
    assert "Removing .tmp-checkpoint-9-\\x1b[2J, left behind" in captured.out
    assert "a\\nerror: fake" in captured.err
    assert not (run / "samples" / ".tmp-0123456789abcdef").exists()
    assert (run / ".tmp-0123456789abcdef").is_dir()


def test_the_id_of_a_service_is_not_read_through_a_link(run, tmp_path):
    """It would be sent there."""
    from trainers.engine.tracking.external import ExternalTracker

    class Service(ExternalTracker):
        def start(self):
            pass

        def log(self, values, step):
            pass

    config = load_config(tiny("conditional_ddpm"))
    (tmp_path / "key").write_text("private")
    path = run / "logs" / "wandb-run-id"
    path.symlink_to(tmp_path / "key")
    assert "private" not in Service(config, run, 6).run_id("wandb")
    assert not path.is_symlink()
    assert (tmp_path / "key").read_text() == "private"
    kept = path.read_text()
    assert Service(config, run, 6).run_id("wandb") == kept
    path.write_text("x" * 1000)
    assert len(Service(config, run, 6).run_id("wandb")) == 8


AS_PYTHON_STARTS_IT = """
import runpy, sys
sys.path[0], sys.argv = sys.argv[1].rpartition("/")[0], [sys.argv[1], "--help"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print(sys.path)
"""


@pytest.mark.parametrize("file", ["train.py", slow("scripts/sample.py")])
def test_the_folder_of_runs_is_on_no_import_path(tmp_path, file):
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", AS_PYTHON_STARTS_IT, str(ROOT / file)]
    found = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    paths = ast.literal_eval(found.stdout.splitlines()[-1])
    assert ROOT not in [Path(path).resolve() for path in paths if path], found.stderr


@pytest.mark.parametrize(
    "text",
    [
        "/home/me/x/w.pt",
        "resnet50:/home/me/x/w.pt",
        "../me/x/w.pt",
        "~/x/w.pt",
        "file:///me/x/w.pt",
        "s=/me/x/w.pt",
        "of '/home/me/w.pt",
        "(/home/me/w.pt",
        '["/home/me/w.pt',
        "`/home/me/w.pt",
        "C:\\me\\w.pt",
        "in D:\\me\\w.pt",
    ],
)
def test_a_path_in_a_card_is_its_last_part(text):
    from trainers.engine.export.model_card import _without_paths

    [found] = _without_paths({"a": [{"b": text}]})["a"]
    assert found["b"].endswith("w.pt")
    assert "me" not in found["b"]


@pytest.mark.parametrize(
    "text",
    [
        "and/or",
        "https://host/a/b",
        "configs/models/unet.json",
        "a photo / a drawing",
        "hf://datasets/a/b",
        "<b>x</b>",
        "a:b",
    ],
)
def test_other_texts_of_a_card_stay(text):
    from trainers.engine.export.model_card import _without_paths

    assert _without_paths(text) == text


def test_a_dry_run_does_not_empty_what_a_link_leads_to(tiny_config, tmp_path, capsys):
    victim = tmp_path / "victim"
    (victim / "sub").mkdir(parents=True)
    (tmp_path / ".config-dry-run").symlink_to(victim)
    assert main([str(tiny_config()), "--dry-run"]) == 1
    assert "is a link, and a dry run empties its folder; remove it" in capsys.readouterr().err
    assert (victim / "sub").is_dir()


def test_a_dry_run_refuses_the_links_that_the_run_refuses(run, tmp_path, capsys):
    shutil.rmtree(run / "samples")
    (run / "samples").symlink_to(tmp_path)
    options = [f"base.output_dir={run}", "base.resume_from_checkpoint=latest", "--dry-run"]
    assert main([str(tiny("conditional_ddpm")), *options]) == 1
    assert "samples is a link; replace it by what it leads to" in capsys.readouterr().err


def test_a_line_is_written_whole_or_not_without_an_error(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    append_line(tmp_path / "lines", {"step": 1})
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))  # as on a disk that becomes full
    try:
        with pytest.raises(OSError, match="lines cannot be written: .*File too large"):
            append_line(tmp_path / "lines", {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
