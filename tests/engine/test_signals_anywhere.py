"""TERM at seeded random moments of a run, from its start to its export: none is lost, none ends in a traceback.

The runs are forked with --slow too: what a process imports before it sets its handler is not what is tested.
"""

from __future__ import annotations

import collections
import os
import random
import shutil
import signal
import time

import pytest
from marks import slow
from processes import Forked

RUN = [
    "configs/tests/ddpm.json", "base.max_train_steps=6", "base.valid_steps=2", "base.validation_split=0.05",
    "base.checkpointing_steps=2", "base.save_model_steps=3", "ddpm.ddpm_num_inference_steps=5",
]  # fmt: skip
FINISHED = "The pipeline is in"


def stopped(arguments, output, seconds):
    """(exit code, output, whether the run was still going on) of a run that gets TERM after some seconds."""
    process = Forked(arguments, out=output)
    time.sleep(seconds)
    running = process.poll() is None
    if running:
        os.kill(process.pid, signal.SIGTERM)
    return process.wait(120), output.read_text(), running


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """The folder of a run with a checkpoint, from which others go on, and the seconds that a whole run takes."""
    folder = tmp_path_factory.mktemp("signals")
    for name in ("first", "run"):  # the first one waits for the server that is forked
        began = time.monotonic()
        assert Forked([*RUN, f"base.output_dir={folder}/{name}"], out=folder / "log").wait(120) == 0
        seconds = time.monotonic() - began
    for name in ("checkpoint-4", "checkpoint-6"):
        shutil.rmtree(folder / "run" / name)
    return folder, seconds


@pytest.mark.parametrize("count", [20, slow(1000)])
def test_no_term_is_lost_and_none_is_a_traceback(stage, tmp_path, count, capsys):
    """Before the handler is set the system ends the process, for which a shell has the same exit code."""
    folder, whole = stage
    rng, table = random.Random(count), collections.Counter()
    for number in range(count):
        run, log = tmp_path / "run", tmp_path / "log"
        resumes = number % 2 == 1
        if resumes:
            shutil.copytree(folder / "run", run)
        options = [f"base.output_dir={run}", *(["base.resume_from_checkpoint=latest"] if resumes else [])]
        seconds = rng.uniform(0, whole)
        code, output, running = stopped([*RUN, *options], log, seconds)
        shown = f"number {number}, after {seconds:.3f} s: exit {code}\n{output[-2000:]}"
        assert "Traceback" not in output, shown
        if not running or (code == 0 and FINISHED in output):
            outcome = "the run had ended"
            assert code == 0, shown
        elif code == -signal.SIGTERM:
            outcome = "before the handler was set, or after it was put back"
            assert FINISHED in output or not (run / ".lock").is_file() or resumes, shown
        else:
            outcome = "saved" if "is written" in output else "outside of the steps"
            assert code == 143, shown
            assert "ended by SIGTERM" in output, shown
        table[outcome] += 1
        shutil.rmtree(run, ignore_errors=True)
        log.unlink()
    with capsys.disabled():
        print(f"\n{count} TERMs: " + ", ".join(f"{what} {n}" for what, n in sorted(table.items())))
    assert table["saved"] + table["outside of the steps"] > count / 3
