"""The run folder is moved, deleted, replaced or full while the run goes on: one line, and whatever can be saved is saved."""

from __future__ import annotations

import os
import shutil

import pytest
from run_folders import steps_of
from torch.utils.tensorboard import SummaryWriter

from train import main
from trainers.engine.checkpoint import writer
from trainers.engine.checkpoint.manifest import verify
from trainers.engine.config.config import find_trainer
from trainers.engine.tracking import tensorboard_tracker, tracker

OPTIONS = {"base.max_train_steps": 8, "base.checkpointing_steps": 4, "base.logging_steps": 2}


@pytest.fixture
def run(tiny_config, tmp_path, monkeypatch, capsys):
    """run(action, step, ...) -> exit code and standard error of a run in which that happens in a step."""

    def start(action, step=3, **options):
        cls, seen = find_trainer("ddpm"), []
        compute = cls.compute_loss

        def at_a_step(self, *arguments):
            seen.append(1)
            if len(seen) == step + 1:
                action(tmp_path / "config")
            return compute(self, *arguments)

        monkeypatch.setattr(cls, "compute_loss", at_a_step)
        code = main([str(tiny_config(**{**OPTIONS, **options}))])
        monkeypatch.undo()
        return code, capsys.readouterr().err

    return start


def moved(folder):
    folder.rename(folder.with_name("elsewhere"))


def replaced(folder):
    moved(folder)
    folder.mkdir()


def deleted(folder):
    shutil.rmtree(folder)


@pytest.mark.parametrize("action", [moved, replaced])
def test_a_moved_folder_gets_the_checkpoint(run, tmp_path, action):
    code, error = run(action)
    elsewhere = tmp_path / "elsewhere"
    assert code == 1
    assert "Traceback" not in error
    assert (
        f"was moved to {elsewhere} during the run; checkpoint-4 is there; continue with base.output_dir={elsewhere}"
        in error
    )
    assert steps_of(elsewhere) == [4]
    verify(elsewhere / "checkpoint-4")
    assert not (tmp_path / "config").exists() or not list((tmp_path / "config").iterdir())


def test_a_moved_folder_is_gone_on_with(run, tmp_path, tiny_config):
    run(moved)
    again = {"base.output_dir": str(tmp_path / "elsewhere"), "base.resume_from_checkpoint": "latest"}
    assert main([str(tiny_config(**OPTIONS, **again))]) == 0
    assert steps_of(tmp_path / "elsewhere") == [8, 4]


def test_a_deleted_folder_is_one_line(run):
    code, error = run(deleted)
    assert code == 1
    assert "Traceback" not in error
    assert "was deleted during the run" in error


def test_logging_notices_a_moved_folder_before_the_next_checkpoint(run, tmp_path):
    code, error = run(moved, step=1, **{"base.max_train_steps": 100, "base.checkpointing_steps": 100})
    assert code == 1
    assert "checkpoint-2 is there" in error
    assert steps_of(tmp_path / "elsewhere") == [2]


def test_pictures_and_trackers_are_not_worth_a_run(tiny_config, tmp_path, monkeypatch, capsys):
    """On a full disk they are left out with one warning; once there is room, they go on."""
    full = OSError(28, os.strerror(28))
    calls = {"pictures": 0, "numbers": 0}

    def no_room(path):
        calls["pictures"] += 1
        raise full

    class Full(SummaryWriter):
        def add_scalar(self, *arguments, **options):
            calls["numbers"] += 1
            if calls["numbers"] < 4:
                raise full
            super().add_scalar(*arguments, **options)

    monkeypatch.setattr(tracker, "new_file", no_room)
    monkeypatch.setattr(tensorboard_tracker, "SummaryWriter", Full)
    options = {**OPTIONS, "base.logger": "tensorboard", "base.valid_steps": 4}
    assert main([str(tiny_config(**options))]) == 0
    output = capsys.readouterr().out
    assert (
        output.count("WARNING: pictures or a tracker's files cannot be written, and the run goes on without them") == 1
    )
    assert "No space left on device" in output
    assert calls["pictures"] == 2
    assert calls["numbers"] > 10
    assert steps_of(tmp_path / "config") == [8, 4]
    assert f"NOTE: {2 + 3} pictures or entries of trackers could not be written" in output


def test_metrics_that_cannot_be_written_save_first(run, tmp_path, monkeypatch):
    def full(folder):
        def no_room(path, values):
            raise OSError(f"{path} cannot be written: No space left on device; 0 bytes are free")

        monkeypatch.setattr(tracker, "append_line", no_room)

    code, error = run(full, step=1, **{"base.max_train_steps": 100, "base.checkpointing_steps": 100})
    assert code == 1
    assert (
        "metrics.jsonl cannot be written: No space left on device; 0 bytes are free; checkpoint-2 is written" in error
    )
    assert steps_of(tmp_path / "config") == [2]


def test_a_folder_that_is_moved_while_a_checkpoint_is_written_keeps_it(tiny_config, tmp_path, monkeypatch, capsys):
    stage = writer.stage

    def then_moved(taken, folder):
        staged = stage(taken, folder)
        if taken.step == 4:
            moved(folder)
        return staged

    monkeypatch.setattr(writer, "stage", then_moved)
    assert main([str(tiny_config(**OPTIONS))]) == 1
    assert "was moved to" in capsys.readouterr().err
    assert 4 in steps_of(tmp_path / "elsewhere")
    assert not list((tmp_path / "elsewhere").glob(".tmp-*"))
