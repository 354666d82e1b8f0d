"""Resuming with another configuration: what would alter the training is refused with old and new value, the rest is told."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from marks import slow
from repository import ROOT, tiny
from run_folders import final_state, losses, read_metrics

from train import main, train
from trainers import TRAINERS
from trainers.engine.checkpoint import config_diff
from trainers.engine.checkpoint.config_diff import option_changes
from trainers.engine.checkpoint.manifest import list_checkpoints
from trainers.engine.checkpoint.writer import sha256
from trainers.engine.config.base_options import BaseConfig
from trainers.engine.config.config import ConfigError, find_trainer, load_config
from trainers.engine.config.schema import options

LATEST = {"base.resume_from_checkpoint": "latest"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 6 steps, with checkpoints 3 and 6."""
    folder = tmp_path_factory.mktemp("trained") / "config"
    return train(load_config(tiny("ddpm"), [f"base.output_dir={folder}", "base.checkpointing_steps=3"]))


@pytest.fixture
def begun(trained, tiny_config, tmp_path):
    """(folder, resume): the run, and resume(**changes) -> exit code of a run that goes on from it."""
    folder = Path(shutil.copytree(trained, tmp_path / "config"))

    def resume(**values):
        AcceleratorState._reset_state(reset_partial_state=True)  # as a new process begins
        return main([str(tiny_config(**{**LATEST, "base.max_train_steps": 8, **values}))])

    return folder, resume


ALTERING = {
    "ddpm.learning_rate": (2e-3, "ddpm.learning_rate: 0.001 -> 0.002"),
    "ddpm.lr_scheduler": ("constant_with_warmup", 'ddpm.lr_scheduler: "constant" -> "constant_with_warmup"'),
    "ddpm.prediction_type": ("v_prediction", 'ddpm.prediction_type: "epsilon" -> "v_prediction"'),
    "ddpm.use_ema": (False, "ddpm.use_ema: true -> false"),
    "ddpm.snr_gamma": (5.0, "ddpm.snr_gamma: null -> 5.0"),
    "ddpm.adam_beta1": (0.5, "ddpm.adam_beta1: 0.9 -> 0.5"),
    "base.seed": (1, "base.seed: 0 -> 1"),
    "base.random_flip": (True, "base.random_flip: false -> true"),
    "base.mixed_precision": ("bf16", 'base.mixed_precision: "no" -> "bf16"'),
    "base.train_batch_size": (8, "global batch size: 4 -> 8"),
    "base.gradient_accumulation_steps": (2, "global batch size: 4 -> 8"),
    "base.max_train_samples": (39, "data set: 40 examples ("),
}


SIBLINGS = ("ddpm.lr_scheduler", "ddpm.snr_gamma", "ddpm.adam_beta1", "base.train_batch_size")  # others stay


@pytest.mark.parametrize("key", [slow(key) if key in SIBLINGS else key for key in ALTERING])
def test_what_alters_the_training_is_refused_unless_it_is_allowed(key, begun, capsys):
    folder, resume = begun
    before = (folder / "metrics.jsonl").read_text()
    value, shown = ALTERING[key]
    assert resume(**{key: value}) == 1
    error = capsys.readouterr().err
    assert "checkpoint-6: the training would continue differently; undo these changes, or accept them with" in error
    assert shown in error
    assert "Traceback" not in error
    assert (folder / "metrics.jsonl").read_text() == before  # nothing was touched
    assert [step for step, _ in list_checkpoints(folder)] == [6, 3]
    names = error.partition("base.allow_changes=[")[2].partition("]")[0].split(",")
    assert resume(**{key: value, "base.allow_changes": names}) == 0
    out = capsys.readouterr().out
    assert f"Changed since the checkpoint: {shown}" in out
    assert " (allowed)" in out


def test_all_changes_are_listed_at_once_and_all_must_be_allowed(begun, capsys):
    _, resume = begun
    values = {"base.seed": 1, "ddpm.adam_beta2": 0.99, "base.train_batch_size": 2}
    assert resume(**values) == 1
    error = capsys.readouterr().err
    assert "base.allow_changes=[seed,adam_beta2,global_batch_size,dataset]" in error  # the seed chooses the 40 examples
    assert error.count(" -> ") == 4
    assert resume(**values, **{"base.allow_changes": ["base.seed", "dataset", "global_batch_size"]}) == 1
    error = capsys.readouterr().err
    assert error.count(" -> ") == 1
    assert "ddpm.adam_beta2: 0.999 -> 0.99" in error


PASSIVE = {
    "base.checkpointing_steps": 4,
    "base.checkpoints_total_limit": 2,
    "base.valid_steps": 2,
    "base.logging_steps": 1,
    "base.dataloader_num_workers": 1,
    "base.image_cache_mb": 0,
    "base.max_skipped_steps": 3,
    "base.gradient_checkpointing": True,
    "base.save_model_steps": 4,
    "ddpm.valid_batch_size": 2,
    "ddpm.sampler": "ddim",
    "ddpm.ddpm_num_inference_steps": 3,
}


def test_what_does_not_alter_it_passes_with_a_line_and_alters_nothing(tiny_config, capsys):
    whole = train(load_config(tiny_config(name="whole", **{"base.max_train_steps": 6})))
    train(load_config(tiny_config(name="part", **{"base.max_train_steps": 3})))
    capsys.readouterr()
    part = train(load_config(tiny_config(name="part", **LATEST, **PASSIVE)))
    out = capsys.readouterr().out
    for key, value in PASSIVE.items():
        assert key == "base.logging_steps" or f"Changed since the checkpoint: {key}: " in out
        assert key == "base.logging_steps" or f" -> {json.dumps(value)}" in out
    assert "output_dir" not in out.partition("network unet")[0]
    assert losses(part) == losses(whole)
    assert final_state(part) == final_state(whole)


@pytest.mark.parametrize("task", TRAINERS)
def test_passive_options_exist(task):
    for schema in (BaseConfig, find_trainer(task).Config):
        assert set(schema.free_on_resume) <= set(options(schema))
        assert len(schema.free_on_resume) == len(set(schema.free_on_resume))


def test_the_same_global_batch_may_be_split_in_another_way(begun, capsys):
    _, resume = begun
    assert resume(**{"base.train_batch_size": 2, "base.gradient_accumulation_steps": 2}) == 0
    assert "Changed since the checkpoint: base.train_batch_size: 4 -> 2" in capsys.readouterr().out


LENGTHS = [  # options of the schedule, steps before and now, whether it may pass
    ({"ddpm.lr_scheduler": "constant"}, 6, 9, True),
    ({"ddpm.lr_scheduler": "constant_with_warmup", "ddpm.lr_warmup_steps": 2}, 6, 9, True),
    ({"ddpm.lr_scheduler": "constant_with_warmup"}, 6, 60, True),  # its warm-up of a tenth, 6 steps, is over
    ({"ddpm.lr_scheduler": "constant_with_warmup"}, 6, 90, False),  # this one's, 9 steps, is not
    ({"ddpm.lr_scheduler": "cosine"}, 6, 9, False),
    ({"ddpm.lr_scheduler": "linear"}, 6, 7, False),
    ({"ddpm.lr_scheduler": "one_cycle"}, 6, 9, False),
]


@pytest.mark.parametrize(("schedule", "before", "now", "passes"), LENGTHS)
def test_the_length_may_be_raised_where_the_rate_does_not_depend_on_it(
    schedule, before, now, passes, tiny_config, capsys
):
    train(load_config(tiny_config(**schedule, **{"base.max_train_steps": before})))
    code = main([str(tiny_config(**schedule, **LATEST, **{"base.max_train_steps": now}))])
    assert code == (0 if passes else 1)
    if not passes:
        assert (
            f"steps: {before} -> {now}; the learning rate of the next step would have been" in capsys.readouterr().err
        )


def test_the_message_shows_the_rates_and_asks_for_the_option(tiny_config, capsys):
    epochs = {"base.max_train_steps": None, "ddpm.lr_scheduler": "linear", "ddpm.lr_warmup_steps": 0}
    folder = train(load_config(tiny_config(**epochs, **{"base.num_epochs": 1, "base.checkpointing_steps": 5})))
    again = {**epochs, "base.num_epochs": 2, "base.resume_from_checkpoint": "checkpoint-5"}
    assert main([str(tiny_config(**again))]) == 1
    error = capsys.readouterr().err
    assert "accept them with base.allow_changes=[num_epochs]" in error
    assert "steps: 10 -> 20; the learning rate of the next step would have been 0.0005, and is now 0.00075" in error
    assert main([str(tiny_config(**again, **{"base.allow_changes": ["num_epochs"]}))]) == 0
    rates = [line["lr"] for line in read_metrics(folder, prefix="lr")]
    assert rates[4:6] == pytest.approx([6e-4, 7.5e-4])
    assert rates[-1] == pytest.approx(1e-3 / 20)


def test_the_rate_before_is_that_of_the_schedule_before(tiny_config, capsys):
    train(load_config(tiny_config()))
    changed = {**LATEST, "base.max_train_steps": 12, "ddpm.lr_scheduler": "linear", "ddpm.lr_warmup_steps": 0}
    assert main([str(tiny_config(**changed))]) == 1
    assert "the next step would have been 0.001, and is now 0.0005" in capsys.readouterr().err


def test_a_checkpoint_of_another_version(begun, capsys):
    folder, resume = begun
    for step in (3, 6):
        path = folder / f"checkpoint-{step}"
        state = json.loads((path / "state.json").read_text()) | {"format": 99}
        (path / "state.json").write_text(json.dumps(state))
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["state.json"] = [(path / "state.json").stat().st_size, sha256(path / "state.json")]
        (path / "manifest.json").write_text(json.dumps(manifest))
    assert resume() == 1
    assert "written by another version of diffloop (format 99, not 1)" in capsys.readouterr().err


def test_an_option_that_is_new_had_its_default(begun, capsys, monkeypatch):
    """A checkpoint of before an option existed: compared with the option's default."""
    _, resume = begun
    original = config_diff.option_changes

    def older(saved, run):
        del saved["ddpm"]["snr_gamma"], saved["base"]["valid_steps"]
        return original(saved, run)

    monkeypatch.setattr(config_diff, "option_changes", lambda saved, run: older(json.loads(json.dumps(saved)), run))
    assert resume() == 0
    assert resume(**{"base.resume_from_checkpoint": "checkpoint-3", "ddpm.snr_gamma": 5.0}) == 1
    assert "ddpm.snr_gamma: null -> 5.0" in capsys.readouterr().err


def test_another_network_is_refused_although_its_file_has_the_same_name(tiny_config, tmp_path, capsys):
    """And the same network from another file passes."""
    network = json.loads((ROOT / "configs/tests/models/unet2d.json").read_text())
    for name, dropout in (("a.json", 0.1), ("b.json", 0.1)):
        (tmp_path / name).write_text(json.dumps(network | {"dropout": dropout}))
    folder = train(load_config(tiny_config(**{"ddpm.model_config": str(tmp_path / "a.json")})))
    changed = {**LATEST, "base.max_train_steps": 8}
    assert main([str(tiny_config(**changed, **{"ddpm.model_config": str(tmp_path / "b.json")}))]) == 0
    (tmp_path / "b.json").write_text(json.dumps(network | {"dropout": 0.5}))
    again = {**changed, "ddpm.model_config": str(tmp_path / "b.json"), "base.max_train_steps": 9}
    capsys.readouterr()
    assert main([str(tiny_config(**again))]) == 1
    error = capsys.readouterr().err
    assert (
        f"{folder}/checkpoint-8/unet: the network changed (dropout: 0.1 -> 0.5); undo that, or accept it with" in error
    )
    assert main([str(tiny_config(**again, **{"base.allow_changes": ["network"]}))]) == 0


def test_a_task_of_ones_own(tiny_config, tmp_path, monkeypatch, capsys):
    """An option without a default, and a section that is renamed."""
    (tmp_path / "own.py").write_text(
        "from dataclasses import dataclass\nfrom trainers.ddpm import DDPMTrainer\n"
        "@dataclass(kw_only=True)\nclass Config(DDPMTrainer.Config):\n    extra: int  # anything\n"
        "class Own(DDPMTrainer):\n    Config = Config\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    document = json.loads(tiny_config(**{"base.trainer_class": "own:Own", "ddpm.extra": 1}).read_text())

    def run(task, **values):
        path = tmp_path / "own.json"
        path.write_text(json.dumps({"base": document["base"] | values, task: document["ddpm"]}))
        return main([str(path)])

    assert run("first") == 0
    latest = {"resume_from_checkpoint": "latest"}
    assert run("first", **latest) == 0
    assert run("second", **latest) == 1
    error = capsys.readouterr().err
    assert error.count(" -> ") == 1
    assert 'base.task: "first" -> "second"' in error
    assert run("second", **latest, allow_changes=["task"]) == 0


def test_a_length_below_the_checkpoint(begun, capsys):
    _, resume = begun
    assert resume(**{"base.max_train_steps": 4}) == 1
    error = capsys.readouterr().err
    assert "base.max_train_steps = 4: the run would end at step 4, and " in error
    assert "checkpoint-6 is later; raise it, or resume from an earlier checkpoint" in error
    assert resume(**{"base.max_train_steps": 4, "base.resume_from_checkpoint": "checkpoint-3"}) == 0


def test_a_resume_that_is_refused_leaves_the_skipped_steps(begun):
    folder, resume = begun
    (folder / "skipped_steps.jsonl").write_text('{"step": 5}\n{"step": 2}\n')
    assert resume(**{"base.seed": 5, "base.resume_from_checkpoint": "checkpoint-3"}) == 1
    assert len((folder / "skipped_steps.jsonl").read_text().splitlines()) == 2
    assert resume(**{"base.resume_from_checkpoint": "checkpoint-3"}) == 0
    assert (folder / "skipped_steps.jsonl").read_text() == '{"step": 2}\n'


def test_rates_are_shown_as_scale_lr_makes_them(tiny_config, capsys):
    options = {"ddpm.lr_scheduler": "linear", "ddpm.lr_warmup_steps": 0, "ddpm.scale_lr": True}
    train(load_config(tiny_config(**options)))
    assert main([str(tiny_config(**options, **LATEST, **{"base.max_train_steps": 12}))]) == 1
    assert "the next step would have been 0, and is now 0.002" in capsys.readouterr().err  # 4 x 0.001 / 2


@pytest.mark.parametrize("name", ["sed", "base.learning_rat", "lora.rank"])
def test_changes_that_are_allowed_must_be_options(name, tiny_config):
    with pytest.raises(ConfigError, match=rf"base.allow_changes: {name} is not an option; did you mean "):
        load_config(tiny_config(**{"base.allow_changes": [name]}))


def test_the_accumulation_follows_from_the_global_batch_size(run_in_process):
    given = run_in_process("given", **{"base.gradient_accumulation_steps": 3})
    followed = run_in_process("followed", **{"base.global_batch_size": 12})
    assert losses(given) == losses(followed)
    assert final_state(given) == final_state(followed)


def test_a_global_batch_size_that_does_not_divide(tiny_config, capsys):
    assert main([str(tiny_config(**{"base.global_batch_size": 10}))]) == 1
    error = capsys.readouterr().err
    assert "base.global_batch_size = 10: must be a multiple of 4 = 4 (train_batch_size) x 1 processes" in error


def test_a_global_batch_size_and_an_accumulation_exclude_each_other(tiny_config, monkeypatch):
    both = {"base.global_batch_size": 8, "base.gradient_accumulation_steps": 2}
    with pytest.raises(ConfigError, match="at most one of gradient_accumulation_steps and global_batch_size"):
        load_config(tiny_config(**both))
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    with pytest.raises(ConfigError, match=r"global_batch_size = 8: the launcher says .* = 2; give one of them"):
        load_config(tiny_config(**{"base.global_batch_size": 8}))


def test_every_option_of_a_task_is_judged(tiny_config):
    """Every option is passive or makes a change that is refused: nothing can drift silently."""
    run = load_config(tiny_config())
    for section, schema in (("base", run.base), ("ddpm", run.config)):
        for option, default in dataclasses.asdict(schema).items():
            saved = {"base": dataclasses.asdict(run.base), "ddpm": dataclasses.asdict(run.config)}
            saved[section][option] = "another" if default != "another" else None
            assert [key for key, _, _ in option_changes(saved, run)] == [f"{section}.{option}"]


@pytest.mark.parametrize(("before", "now", "changed"), [("", None, []), (None, "", []), ("x", None, ["base.caption"])])
def test_the_empty_caption_of_earlier_versions_is_todays_null(tiny_config, before, now, changed):
    run = load_config(tiny_config("ddpm", "run", **{"base.caption": now}))
    saved = json.loads(json.dumps(run.as_dict()))
    saved["base"]["caption"] = before
    assert [key for key, *_ in option_changes(saved, run)] == changed
