"""Signals: the step is finished, the run saved, the exit code right, on every rank, however the run was launched."""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
from marks import slow
from processes import start, wait_for
from run_folders import final_state, logged_steps, losses, read_metrics

from train import main, train
from trainers.engine.checkpoint.manifest import list_checkpoints, verify
from trainers.engine.config.config import load_config
from trainers.engine.config.errors import Interrupted
from trainers.engine.run.signals import DIVERGED, FAULT, Abandoned, StopSignals, launcher_pid

STEPS = 20
MEASURED = ("seconds", "per_second", "memory_gib")  # ends of the names of what differs between runs
RUN = [
    "configs/tests/ddpm.json", f"base.max_train_steps={STEPS}", "base.validation_split=0.02", "base.random_flip=true",
    "base.dataloader_num_workers=1", "base.image_cache_mb=0", "base.checkpointing_steps=50", "ddpm.ddpm_num_steps=1000",
]  # fmt: skip
ACCELERATE = [
    str(Path(sys.executable).with_name("accelerate")),
    "launch",
    "--num_processes",
    "1",
    "--num_machines",
    "1",
]
ACCELERATE += ["--dynamo_backend", "no", "--mixed_precision", "no", "--cpu", "--num_cpu_threads_per_process", "1"]
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 75, signal.SIGHUP: 129}
MOMENTS = {
    "training": ["base.valid_steps=50"],
    "validation": ["base.valid_steps=3", "ddpm.ddpm_num_inference_steps=1000"],
    "save": ["base.valid_steps=50", "base.checkpointing_steps=3"],
}


def children_of(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def command_of(pid):
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def launch(kind, moment, folder, log):
    """(the process, the pids of its ranks) of a run that has come to the moment."""
    faults = {"slow_steps": 0.5 if kind == "accelerate" else 0.15}  # a dying launcher takes its time
    faults |= {"slow_write": 3} if moment == "save" else {}
    processes = 2 if kind == "torchrun" else 1
    options = [*RUN, *MOMENTS[moment], f"base.output_dir={folder}"]
    options += [f"base.gradient_accumulation_steps={2 // processes}"]
    launcher = ACCELERATE if kind == "accelerate" else None
    process = start(*options, processes=processes, launcher=launcher, faults=faults, out=log, forked=kind == "python")
    step = 3 if moment == "validation" else 2
    wait_for(lambda: step in logged_steps(folder), process)
    if moment == "save":
        wait_for(lambda: list(folder.glob(".tmp-checkpoint-3-*")), process)
    if moment == "validation":
        time.sleep(0.5)
    if kind == "python":
        return process, [process.pid]
    return process, [pid for pid in children_of(process.pid) if b"faulty.py" in command_of(pid)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    options = [*RUN, *MOMENTS["training"], "base.gradient_accumulation_steps=2", f"base.output_dir={folder}"]
    assert main(options) == 0
    return folder


def check_resume(folder, whole, moment):
    """Resumed in this process, whatever the processes before: the run is the uninterrupted one."""
    options = [*RUN, *MOMENTS[moment], "base.gradient_accumulation_steps=2", "ddpm.ddpm_num_inference_steps=2"]
    if moment == "validation":
        options.append("base.valid_steps=20")
    assert main([*options, f"base.output_dir={folder}", "base.resume_from_checkpoint=latest"]) == 0
    assert losses(folder) == losses(whole)
    assert final_state(folder, STEPS) == final_state(whole, STEPS)


MATRIX = [
    (kind, number, moment) for kind in ("python", "accelerate", "torchrun") for number in CODES for moment in MOMENTS
]
QUICK = [
    ("python", signal.SIGTERM, "training"),
    ("python", signal.SIGINT, "save"),
    ("python", signal.SIGUSR1, "validation"),
]


@pytest.mark.parametrize(
    ("kind", "number", "moment"),
    [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in MATRIX],
    ids=lambda value: getattr(value, "name", value),
)
def test_one_rank_gets_a_signal(kind, number, moment, whole, tmp_path):
    """All ranks stop after the same step, data workers and all, and the run can be resumed exactly."""
    folder = tmp_path / "run"
    process, ranks = launch(kind, moment, folder, tmp_path / "log")
    signalled, target = time.monotonic(), ranks[-1]
    for worker in children_of(target):  # a job's signal reaches its data workers, too, and before
        os.kill(worker, number)
    os.kill(target, number)
    code = process.wait(300)
    seconds = time.monotonic() - signalled
    text = (tmp_path / "log").read_text()
    if kind == "python":
        assert code == CODES[number]
        assert "Traceback" not in text
    else:  # the launchers have exit codes of their own, and name those of their processes
        assert code != 0
        assert re.search(rf"exit (code|status) {CODES[number]}|exitcode\s*: {CODES[number]}", text), text
    step, sealed = list_checkpoints(folder)[0]
    verify(sealed)
    assert f"ended by {number.name} after step {step}; checkpoint-{step} is written; continue with" in text
    assert max(losses(folder)) == step < STEPS
    if moment == "validation":
        assert "Validation at step 3 interrupted; it runs again on resume" in text
        assert seconds < 15
        assert not read_metrics(folder, prefix="valid")
    if moment == "save":
        assert {found for found, _ in list_checkpoints(folder)} == {3, step}  # what was in flight is sealed first
    check_resume(folder, whole, moment)


@pytest.mark.parametrize("number", [signal.SIGTERM, slow(signal.SIGINT)])
def test_a_run_whose_launcher_dies_ends(number, whole, tmp_path):
    """One-process `accelerate launch` forwards nothing: it dies and would leave the training behind."""
    folder = tmp_path / "run"
    process, [rank] = launch("accelerate", "training", folder, tmp_path / "log")
    os.kill(process.pid, number)
    process.wait(300)
    wait_for(lambda: not Path(f"/proc/{rank}").exists())
    [(step, _)] = list_checkpoints(folder)
    assert f"ended by SIGTERM after step {step}" in (tmp_path / "log").read_text()
    check_resume(folder, whole, "training")


@pytest.mark.slow
def test_torchrun_is_ended(whole, tmp_path):
    """It forwards TERM to its processes and waits for them."""
    process, _ = launch("torchrun", "training", tmp_path / "run", tmp_path / "log")
    process.terminate()
    process.wait(300)
    check_resume(tmp_path / "run", whole, "training")


def test_a_validation_that_was_interrupted_is_made_up(tiny_config, monkeypatch):
    """Interrupted right after the checkpoint of a step that validates, the run validates before it goes on."""
    options = {"base.valid_steps": 2, "base.checkpointing_steps": 2, "base.validation_split": 0.02}
    folder = train(load_config(tiny_config(name="whole", **options)))

    def interrupt(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("trainers.engine.validation.validation.Validation.held_out_metrics", interrupt)
        assert main([str(tiny_config(name="cut", **options))]) == 130
    cut = folder.with_name("cut")
    assert [step for step, _ in list_checkpoints(cut)] == [2]
    assert main([str(tiny_config(name="cut", **options, **{"base.resume_from_checkpoint": "latest"}))]) == 0
    lines = [
        [
            {k: v for k, v in line.items() if not k.endswith(MEASURED)}
            for line in read_metrics(path, prefix=("loss", "valid"))
        ]
        for path in (cut, folder)
    ]
    assert lines[0] == lines[1]
    names = [sorted(path.name for path in (run / "samples").iterdir()) for run in (cut, folder)]
    assert names[0] == names[1]


@pytest.fixture
def stopping(monkeypatch):
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_DFL)  # whether or not nohup started the tests
    with StopSignals(1800.0) as found:
        yield found
        found.asked = 0  # the tests caught what it led to


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in CODES]
    with StopSignals(1800.0):
        assert [signal.getsignal(number) for number in CODES] != before
    assert [signal.getsignal(number) for number in CODES] == before


@pytest.mark.parametrize("number", CODES)
def test_outside_of_the_steps_a_signal_ends_the_run_at_once(stopping, number):
    with pytest.raises(Interrupted, match=f"ended by {number.name} outside of the steps") as caught:
        os.kill(os.getpid(), number)
    assert caught.value.code == CODES[number]


class SignalInTheEnd:
    """An object whose removal meets a signal: Python prints what is raised there, and goes on."""

    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)


def swallowed():
    with StopSignals(1800.0) as stop:
        SignalInTheEnd()
        assert list(stop.steps(0, 3)) == []


def at_the_end():
    with StopSignals(1800.0):
        SignalInTheEnd()


def turned_into_an_error():
    """As safetensors.load_file does, which then names the shape of a storage."""
    with StopSignals(1800.0):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except BaseException:
            raise ValueError("could not determine the shape") from None


@pytest.mark.parametrize("lost", [swallowed, at_the_end, turned_into_an_error])
def test_a_signal_whose_exception_is_lost_is_remembered(lost, recwarn):
    with pytest.raises(Interrupted, match="ended by SIGTERM outside of the steps") as caught:
        lost()
    assert caught.value.code == 143
    assert not recwarn.list  # Python says nothing of an exception that it ignored


def test_an_error_without_a_signal_is_itself():
    with pytest.raises(ValueError, match="^broken$"), StopSignals(1800.0):
        raise ValueError("broken")


def test_an_error_of_the_last_save_is_not_hidden_by_the_signal(stopping):
    for _ in stopping.steps(0, 3):
        os.kill(os.getpid(), signal.SIGTERM)
        stopping.agreed()

    def full(step):
        raise OSError("checkpoint-1 does not fit")

    with pytest.raises(OSError, match="checkpoint-1 does not fit"):
        stopping.finish(full, nothing)


def test_nohup_keeps_a_run_from_the_end_of_its_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals(1800.0) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert list(stop.steps(0, 2)) == [0, 1]
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_terminal_that_is_gone_is_no_error(stopping, monkeypatch):
    def gone(descriptor, text):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("trainers.engine.run.signals.os.write", gone)
    for _ in stopping.steps(0, 3):
        os.kill(os.getpid(), signal.SIGHUP)
        assert stopping.agreed()


def test_a_signal_ends_the_steps_after_the_one_that_it_met(stopping):
    done, saved = [], []
    for step in stopping.steps(3, 9):
        if step == 5:
            os.kill(os.getpid(), signal.SIGUSR1)
        done.append(step)
        stopping.agreed()
    assert done == [3, 4, 5]
    with pytest.raises(Interrupted, match=r"after step 6; checkpoint-6 is written") as caught:
        stopping.finish(saved.append, lambda: saved.append("closed"))
    assert (caught.value.code, saved) == (75, [6, "closed"])


def test_a_long_loop_within_a_step_is_left(stopping):
    seen = []

    def loop():
        for item in stopping.watch(range(9), "items"):
            seen.append(item)
            if item == 2:
                stopping.ask(signal.SIGTERM)

    with pytest.raises(Abandoned):
        loop()
    assert seen == [0, 1, 2]


def test_the_third_signal_is_not_caught(stopping, monkeypatch):
    killed = []
    monkeypatch.setattr("trainers.engine.run.signals.os.kill", lambda *arguments: killed.append(arguments))
    stopping.waits = True
    for _ in range(3):
        stopping._receive(signal.SIGTERM, None)
    assert killed == [(os.getpid(), signal.SIGTERM)]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def nothing():
    pass


def test_faults_and_divergence(stopping):
    saved = []
    stopping.steps_done = 1
    stopping.ask(FAULT, "a worker died")
    with pytest.raises(OSError, match="a worker died; checkpoint-1 is written"):
        stopping.finish(saved.append, nothing)
    assert saved == [1]
    stopping.ask(DIVERGED, "hopeless")
    with pytest.raises(ValueError, match="^hopeless$"):
        stopping.finish(saved.append, nothing)


def test_a_signal_in_the_last_step_is_not_lost(stopping):
    for _ in stopping.steps(0, 3):
        stopping.agreed()
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Interrupted):
        stopping.finish(lambda step: None, nothing)
    os.kill(os.getpid(), signal.SIGTERM)  # what a launcher sends when its first process has ended
    assert stopping.received == 2


def test_an_end_that_nobody_asked_for_saves_nothing(stopping):
    assert list(stopping.steps(0, 3)) == [0, 1, 2]
    stopping.finish(lambda step: pytest.fail("saved"), nothing)


def test_only_a_launcher_is_followed_into_death():
    """The parent of this test is a shell or the like; a run under nohup must outlive it."""
    assert launcher_pid() is None


def test_a_signal_ends_the_command_with_its_code(tiny_config, monkeypatch, capsys):
    def interrupt(run):
        raise Interrupted("ended by SIGUSR1 after step 3", 75)

    monkeypatch.setattr("train.train", interrupt)
    assert main([str(tiny_config())]) == 75
    assert "ended by SIGUSR1 after step 3" in capsys.readouterr().err
