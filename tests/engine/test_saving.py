"""Checkpoints written beside the training: they hold their own step, come one at a time, and fail as loudly as before."""

from __future__ import annotations

import threading
import time
import weakref

import pytest
from marks import slow
from processes import start, wait_for
from run_folders import final_state, hidden, logged_steps, losses, read_metrics, steps_of

from train import main, train
from trainers import weight_files
from trainers.engine.checkpoint import saver, writer
from trainers.engine.checkpoint.manifest import verify
from trainers.engine.checkpoint.saver import Saver
from trainers.engine.config.config import load_config
from trainers.engine.export import pipeline
from trainers.engine.optim import optimizer
from trainers.engine.validation import validation

EVERY_THIRD = {"base.checkpointing_steps": 3}


@pytest.fixture
def write_when(monkeypatch):
    """write_when(condition): from now on the thread writes once it holds for (snapshot, output_dir)."""

    def patch(condition):
        original = writer.write

        def waiting(taken, folder):
            wait_for(lambda: condition(taken, folder.parent), seconds=30)
            original(taken, folder)

        monkeypatch.setattr(writer, "write", waiting)

    return patch


def test_a_checkpoint_holds_its_own_step_although_the_training_goes_on(run_in_process, write_when, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Saver, "begin", lambda self, step, begin=Saver.begin: (begin(self, step), self.wait()))
        at_once = run_in_process("at_once", **EVERY_THIRD)
    write_when(lambda taken, folder: taken.step == 6 or 5 in logged_steps(folder))
    beside = run_in_process("beside", **EVERY_THIRD)
    for step in (3, 6):
        verify(beside / f"checkpoint-{step}")
        assert final_state(beside, step) == final_state(at_once, step)
    assert losses(beside) == losses(at_once)
    state = (beside / "checkpoint-3" / "state.json").read_text()
    assert state == (at_once / "checkpoint-3" / "state.json").read_text().replace("/at_once", "/beside")


def test_saves_closer_than_a_write_takes_wait_for_each_other(run_in_process, monkeypatch):
    """One at a time; the next copy is made in the memory of the one before."""
    events, copies, places = [], [], []
    write, snapshot = writer.write, saver.snapshot

    def slow(taken, folder):
        events.append(f"write {taken.step}")
        time.sleep(0.2)
        write(taken, folder)
        events.append(f"written {taken.step}")

    def copy(*arguments):
        assert not [reference for reference in copies if reference() is not None]
        taken = snapshot(*arguments)
        copies.append(weakref.ref(taken))
        places.append({tensor.data_ptr() for values in taken.tensors.values() for tensor in values.values()})
        return taken

    monkeypatch.setattr(writer, "write", slow)
    monkeypatch.setattr(saver, "snapshot", copy)
    folder = run_in_process(**{"base.checkpointing_steps": 1, "base.checkpoints_total_limit": 2})
    assert events == [f"{what} {step}" for step in range(1, 7) for what in ("write", "written")]
    assert all(place == places[0] for place in places)
    assert len(places) == 6
    assert steps_of(folder) == [6, 5]
    assert hidden(folder) == [".lock"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), PermissionError(13, "Permission denied")])
def test_a_write_that_fails_beside_the_training_ends_the_run(tiny_config, monkeypatch, capsys, error):
    """At the next step or the one after, with the same message; the half checkpoint is removed, older ones stay."""
    write = writer.write

    def fail(taken, folder):
        write(taken, folder)
        if taken.step == 4:
            raise error

    monkeypatch.setattr(writer, "write", fail)
    path = tiny_config(**{"base.checkpointing_steps": 2, "base.max_train_steps": 40})
    assert main([str(path)]) == 1
    text, folder = capsys.readouterr().err, path.with_suffix("")
    assert f"checkpoint-4 could not be written to {folder}: {error}; it needs " in text
    assert "older checkpoints are intact; make room and continue" in text
    assert "Traceback" not in text
    assert steps_of(folder) == [2]
    assert hidden(folder) == [".lock"]
    assert max(losses(folder)) <= 6


def test_a_bug_in_the_thread_is_shown_with_its_place(tiny_config, monkeypatch):
    monkeypatch.setattr(writer, "sha256", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught:
        main([str(tiny_config())])
    assert "<lambda>" in [entry.name for entry in caught.traceback]


def test_a_checkpoint_that_cannot_get_its_name(tiny_config, monkeypatch, capsys):
    monkeypatch.setattr(writer.Path, "rename", lambda self, target: (_ for _ in ()).throw(OSError(5, "I/O error")))
    path = tiny_config()
    assert main([str(path)]) == 1
    assert "checkpoint-6 could not be written to" in capsys.readouterr().err
    assert hidden(path.with_suffix("")) == [".lock"]


def test_only_the_writer_of_two_fails(tmp_path):
    """Both processes raise the same error, in the middle of the run."""
    options = [f"base.output_dir={tmp_path}/run", "base.checkpointing_steps=2", "base.max_train_steps=40"]
    faults = {"fail_write": [4, 0], "note_errors": str(tmp_path / "error")}
    process = start("configs/tests/ddpm.json", *options, processes=2, faults=faults, out=tmp_path / "log")
    assert process.wait(300) != 0
    texts = [(tmp_path / f"error-{rank}").read_text() for rank in (0, 1)]
    assert texts[0] == texts[1]
    assert "checkpoint-4 could not be written to" in texts[0]
    assert steps_of(tmp_path / "run") == [2]
    assert hidden(tmp_path / "run") == [".lock"]


@pytest.mark.parametrize("processes", [1, slow(2)])
def test_kill_9_while_a_checkpoint_is_written(tmp_path, processes):
    """The one in flight is lost, the one before is exact, and what is left behind is removed."""
    folder = tmp_path / "run"
    options = ["configs/tests/ddpm.json", "base.max_train_steps=8", "base.random_flip=true", "base.resolution=24"]
    saves = [*options, f"base.output_dir={folder}", "base.checkpointing_steps=2"]
    process = start(*saves, processes=processes, faults={"slow_write": 2, "kill_in_save": [4, 0]})
    assert process.wait(300) != 0
    assert steps_of(folder) == [2]
    assert [name.rpartition("-")[0] for name in hidden(folder)[1:]] == [".tmp-checkpoint-4"]
    assert max(logged_steps(folder)) > 4  # it went on
    accumulation = f"base.gradient_accumulation_steps={processes}"
    assert main([*saves, accumulation, "base.resume_from_checkpoint=latest"]) == 0
    assert main([*options, accumulation, f"base.output_dir={tmp_path}/whole"]) == 0
    assert final_state(folder, 8) == final_state(tmp_path / "whole", 8)
    assert losses(folder) == losses(tmp_path / "whole")
    assert hidden(folder) == [".lock"]


def test_a_run_that_ends_while_its_last_checkpoint_is_written(run_in_process, write_when, monkeypatch):
    """The pipeline is written after it: what follows finds the checkpoint sealed."""
    found, original = [], pipeline.export_pipeline

    def look(accelerator, trainer, ema, tracking, *others):
        found.extend(steps_of(tracking.output_dir))
        return original(accelerator, trainer, ema, tracking, *others)

    monkeypatch.setattr(pipeline, "export_pipeline", look)
    began = time.monotonic()
    write_when(lambda taken, folder: time.monotonic() > began + 1)
    run_in_process()
    assert found == [6]


@pytest.mark.parametrize("fails", [False, True])
def test_an_error_in_the_loop_does_not_lose_what_is_in_flight(tiny_config, monkeypatch, capsys, fails):
    write, failed = writer.write, threading.Event()

    def late(taken, folder):
        failed.wait(30)
        write(taken, folder)
        if fails:
            raise OSError(28, "No space left on device")

    def broken_step(*arguments, original=optimizer.optimizer_step, done=[]):  # noqa: B006
        done.append(1)
        if len(done) == 5:
            failed.set()
            raise RuntimeError("a bug")
        return original(*arguments)

    monkeypatch.setattr(writer, "write", late)
    monkeypatch.setattr(optimizer, "optimizer_step", broken_step)
    path = tiny_config(**EVERY_THIRD)
    with pytest.raises(RuntimeError, match="a bug"):
        train(load_config(path))
    assert steps_of(path.with_suffix("")) == ([] if fails else [3])
    assert hidden(path.with_suffix("")) == [".lock"]
    assert ("WARNING: checkpoint-3 could not be written" in capsys.readouterr().out) == fails


def test_a_long_validation_does_not_keep_a_checkpoint_open(run_in_process, monkeypatch):
    """What is written while pictures are drawn is sealed then: the validation may take longer than all steps."""
    found, written = [], threading.Event()
    original, log_grids = Saver._write, validation.Tracker.log_grids

    def write(self, taken):
        try:
            return original(self, taken)
        finally:
            written.set()

    def bar(accelerator, what, items):
        return (written.wait(30) and item for item in items)

    def look(self, grids, step):
        found.append((step, steps_of(self.output_dir)))
        log_grids(self, grids, step)

    monkeypatch.setattr(Saver, "_write", write)
    monkeypatch.setattr(validation, "passing_bar", bar)
    monkeypatch.setattr(validation.Tracker, "log_grids", look)
    folder = run_in_process(**EVERY_THIRD, **{"base.valid_steps": 3, "ddpm.ddpm_num_inference_steps": 5})
    assert found[0] == (3, [3])
    assert steps_of(folder) == [6, 3]
    assert [line["step"] for line in read_metrics(folder, prefix="valid")] == [3, 6]


def test_the_mode_of_files_is_found_without_a_change_that_all_threads_would_see(tmp_path, monkeypatch):
    monkeypatch.setattr("os.umask", lambda mask: pytest.fail("another thread may create a file now"))
    (tmp_path / "plain").touch()
    weight_files.write_tensors({}, tmp_path / "tensors")
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "a.safetensors").touch(0o600)
    weight_files.make_readable(tmp_path / "private")
    (tmp_path / "private" / "a.safetensors").rename(tmp_path / "a.safetensors")
    (tmp_path / "private").rmdir()
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1
