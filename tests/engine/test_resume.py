"""A resumed run cannot be told from an uninterrupted one: losses by float.hex(), weights, averages, optimizer state by byte.

The interrupted run is cut by its checkpoint: it trains to the end, then everything after the checkpoint is removed.
"""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from marks import slow
from resuming import RANDOM, check_resume
from run_folders import final_state, losses, read_metrics
from safetensors.torch import save_file

from train import main, train
from trainers import TRAINERS
from trainers.engine.checkpoint import load, resume
from trainers.engine.checkpoint.manifest import list_checkpoints
from trainers.engine.config.config import load_config

CASES = {
    "in the middle of an epoch": {},
    "at the end of an epoch": {"base.max_train_samples": 8},
    "with accumulation": {"base.gradient_accumulation_steps": 2},
    "with workers": {"base.dataloader_num_workers": 2, "base.image_cache_mb": 0, **RANDOM},
    "with random crop and flip": RANDOM,
    "with a log window that is open": {"base.logging_steps": 3},
    "with an epoch schedule": {
        "base.max_train_steps": None,
        "base.num_epochs": 2,
        "base.max_train_samples": 11,
        "ddpm.lr_scheduler": "cosine",
    },
    "in bf16 with channels last": {"base.mixed_precision": "bf16", "base.channels_last": True},
}


@pytest.mark.parametrize("case", CASES)
def test_resume_is_exact(case, tiny_config):
    check_resume(tiny_config, CASES[case])


def test_resume_is_exact_with_other_cadences_and_workers(tiny_config):
    changed = {"base.valid_steps": 1, "base.dataloader_num_workers": 1, "base.save_model_steps": 5}
    changed["base.image_cache_mb"] = 0
    options = {**RANDOM, "base.validation_split": 0.02}
    whole, _ = check_resume(tiny_config, options, changed)
    rarely = train(load_config(tiny_config("ddpm", "rarely", **options)))  # one checkpoint, at the end
    assert losses(rarely) == losses(whole)
    assert final_state(rarely) == final_state(whole)


ALWAYS = ("ddpm", "lora", "vae")  # one network, an adapter, two networks


@pytest.mark.parametrize("task", [task if task in ALWAYS else slow(task) for task in TRAINERS])
def test_every_task_resumes_exactly(task, tiny_config):
    check_resume(tiny_config, {"base.gradient_accumulation_steps": 2, "base.logging_steps": 1}, task=task)


def test_without_the_checkpoints_state_the_runs_differ(tiny_config, monkeypatch):
    """The comparison can fail: without the optimizer's state the losses after the cut are others."""
    monkeypatch.setattr(resume, "read_optimizer_state", lambda *_: {})
    with pytest.raises(AssertionError):
        check_resume(tiny_config, {})


def test_resume_by_name_and_by_path(tiny_config, capsys):
    folder = train(load_config(tiny_config(**{"base.checkpointing_steps": 2})))
    for place, name in ((str(folder / "checkpoint-4"), "elsewhere"), ("checkpoint-2", "config"), (True, "config")):
        resumed = train(load_config(tiny_config(name=name, **{"base.resume_from_checkpoint": place})))
        assert "resumed at" in capsys.readouterr().out
        assert final_state(resumed) == final_state(folder)


def test_latest_without_a_checkpoint_starts_at_0_and_says_so(tiny_config, capsys):
    train(load_config(tiny_config(**{"base.resume_from_checkpoint": "latest"})))
    assert "No checkpoint in" in capsys.readouterr().out


def test_a_finished_run_says_so(tiny_config, capsys):
    folder = train(load_config(tiny_config()))
    before, card = (folder / "metrics.jsonl").read_text(), (folder / "README.md").read_text()
    assert main([str(tiny_config(**{"base.resume_from_checkpoint": "latest"}))]) == 0
    assert "the run is finished already" in capsys.readouterr().out
    after = (folder / "metrics.jsonl").read_text()
    added = [json.loads(line).keys() - {"step"} for line in after.removeprefix(before).splitlines()]
    assert after.startswith(before)
    assert added == [{"prepare_train/seconds", "start/peak_memory_gib"}, {"export/seconds", "export/peak_memory_gib"}]
    assert (folder / "README.md").read_text() == card.replace(
        "resume_from_checkpoint: null", "resume_from_checkpoint: latest"
    )


def test_longer_and_with_another_global_batch(tiny_config):
    folder = train(load_config(tiny_config()))
    options = {
        "base.resume_from_checkpoint": "latest",
        "base.max_train_steps": 8,
        "base.train_batch_size": 8,
        "base.allow_changes": ["global_batch_size"],
    }
    train(load_config(tiny_config(**options)))
    assert [line["epoch"] for line in read_metrics(folder, prefix="loss")] == pytest.approx(
        [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0]
    )
    assert json.loads((folder / "checkpoint-8" / "state.json").read_text())["slot"] == 40


def test_errors_of_resuming(tiny_config, capsys):
    folder = train(load_config(tiny_config(**{"base.checkpointing_steps": 3})))

    def error_of(**values):
        assert (
            main([str(tiny_config(**{"base.resume_from_checkpoint": "latest", "base.max_train_steps": 8, **values}))])
            == 1
        )
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return captured.out + captured.err

    text = error_of(**{"base.resume_from_checkpoint": "checkpoint-5"})
    assert "resume_from_checkpoint = checkpoint-5: no such folder; checkpoints in" in text
    assert "checkpoint-6, checkpoint-3" in text
    assert f"= {folder}: a folder of checkpoints; name one, such as {folder}/checkpoint-6" in error_of(
        **{"base.resume_from_checkpoint": str(folder)}
    )
    other = {
        "ddpm.model_config": "configs/models/unet_digits.json",
        "base.resume_from_checkpoint": "checkpoint-3",
        "base.allow_changes": ["network"],
    }
    assert "does not fit this run's network" in error_of(**other)
    assert [step for step, _ in list_checkpoints(folder)] == [6, 3]
    assert len(losses(folder)) == 6  # a resume that fails has changed nothing
    weights = folder / "checkpoint-6" / "unet" / "diffusion_pytorch_model.safetensors"
    flipped = bytearray(weights.read_bytes())
    flipped[-1] ^= 1
    weights.write_bytes(flipped)
    assert "unet/diffusion_pytorch_model.safetensors is missing or not what was written" in error_of(
        **{"base.resume_from_checkpoint": "checkpoint-6"}
    )
    shutil.rmtree(folder / "checkpoint-3" / "unet_ema")
    assert "all 2 checkpoints in" in error_of()
    assert "damaged; remove them to start at step 0" in error_of()


def test_latest_skips_a_damaged_checkpoint_loudly(tiny_config, capsys):
    folder = train(load_config(tiny_config(**{"base.checkpointing_steps": 3})))
    (folder / "checkpoint-6" / "manifest.json").unlink()
    train(load_config(tiny_config(**{"base.resume_from_checkpoint": "latest"})))
    out = capsys.readouterr().out
    assert "WARNING: skipping a damaged checkpoint" in out
    assert "resumed at 3" in out


def test_a_checkpoint_without_averages(tiny_config, capsys):
    train(load_config(tiny_config(**{"ddpm.use_ema": False})))
    options = {"base.resume_from_checkpoint": "latest", "base.allow_changes": ["use_ema"]}
    assert main([str(tiny_config(**options))]) == 1
    assert "has no unet_ema: it was written with use_ema: false; set use_ema to false" in capsys.readouterr().err


def test_going_on_from_an_older_checkpoint_sets_the_later_ones_aside(tiny_config, capsys):
    train(load_config(tiny_config(**{"base.checkpointing_steps": 2})))
    options = {
        "base.resume_from_checkpoint": "checkpoint-2",
        "base.max_train_steps": 4,
        "base.checkpoints_total_limit": 1,
    }
    folder = train(load_config(tiny_config(**options)))
    assert [step for step, _ in list_checkpoints(folder)] == [4]
    assert sorted(path.name.split("-", 3)[3] for path in folder.glob("set-aside-*")) == [
        "checkpoint-4",
        "checkpoint-6",
        "metrics.jsonl",
    ]
    assert "is not of the run from " in capsys.readouterr().out


def test_going_on_from_another_runs_checkpoint_sets_all_of_this_run_aside(tiny_config):
    source = train(load_config(tiny_config(name="source", **{"base.checkpointing_steps": 3})))
    folder = train(load_config(tiny_config(**{"base.checkpointing_steps": 2, "ddpm.learning_rate": 1e-2})))
    train(load_config(tiny_config(**{"base.resume_from_checkpoint": str(source / "checkpoint-3")})))
    assert [step for step, _ in list_checkpoints(folder)] == [6]
    assert final_state(folder) == final_state(source)
    assert list(losses(folder)) == [4, 5, 6]
    aside = sorted(path.name.split("-", 3)[3] for path in folder.glob("set-aside-*"))
    assert aside == ["checkpoint-2", "checkpoint-4", "checkpoint-6", "metrics.jsonl"]


def test_a_run_that_has_lost_its_checkpoints_keeps_its_log(tiny_config):
    folder = train(load_config(tiny_config()))
    shutil.rmtree(folder / "checkpoint-6")
    before = (folder / "metrics.jsonl").read_text()
    train(load_config(tiny_config(**{"base.resume_from_checkpoint": "latest"})))
    [aside] = folder.glob("set-aside-*-metrics.jsonl")
    assert aside.read_text() == before
    assert list(losses(folder)) == [1, 2, 3, 4, 5, 6]


def test_checkpoints_of_another_run(tmp_path):
    with pytest.raises(ValueError, match="unet holds no weights; the checkpoint is of a run with other networks"):
        load.read_weights(tmp_path, {"unet": torch.nn.Linear(1, 1)})
    save_file({"net.old.exp_avg": torch.zeros(1)}, tmp_path / "optimizer.safetensors")
    with pytest.raises(ValueError, match="has state for parameters that this run does not train"):
        load.read_optimizer_state(tmp_path, {"net": torch.nn.Linear(1, 1)})


def test_names_that_are_no_checkpoint(tmp_path):
    for name in (
        "checkpoint",
        "checkpoint-",
        "checkpoint-x",
        "checkpoint-3.tmp",
        "checkpoint-03",
        ".tmp-checkpoint-3-1",
        "checkpoint-10",
        "checkpoint-9",
    ):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-11").symlink_to(tmp_path / "checkpoint-10")
    assert [path.name for _, path in list_checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-9"]
