"""Bytes that each engine holds and sends in a step, and the step's time: processes of a CPU, connected by gloo."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from scripts.benchmarks.measured import ENGINES
from scripts.benchmarks.runs import ROOT, in_turns

TASKS = ("ddpm", "dit")
BATCH = 4  # few examples, so that messages take a part of a step
OWN_LOOPBACK = ("unshare", "-rn", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")
FEW_BYTES = 1000  # such as those that say whether to stop
MIB = 2**20


def rows(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each network and engine; runs take turns, in processes of one thread."""
    found = []
    for task in TASKS:
        sides = {engine: partial(run, engine, task, asked.steps) for engine in ENGINES}
        for engine, runs in in_turns(sides, asked.pairs).items():
            found.append({"network": task, "engine": engine} | row(ENGINES[engine][0], runs))
    return found


def run(engine: str, task: str, steps: int) -> dict[str, Any]:
    """Measurements of a run's first process, and the seconds of its restart."""
    with tempfile.TemporaryDirectory() as folder:
        given = (folder, engine, task, steps, f"base.train_batch_size={BATCH}")
        return launched("measure", *given) | {"restart_seconds": launched("restart", *given)}


def launched(mode: str, folder: str | Path, engine: str, *arguments: Any, threads: int = 1) -> Any:
    """Runs a function of measured.py on the engine's processes and returns the first one's result.

    Raises RuntimeError if it fails.
    """
    processes = ENGINES[engine][0]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    python = [sys.executable, *(torchrun if processes > 1 else [])]
    module = ["-m", "scripts.benchmarks.measured", mode, str(folder), engine, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    environment |= {} if torch.cuda.is_available() else {"ACCELERATE_USE_CPU": "true"}
    command = [*own_loopback(), *python, *module]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(Path(folder, "found.json").read_text(encoding="utf-8"))


def own_loopback() -> tuple[str, ...]:
    """A prefix that gives a command its own loopback; empty if the system does not allow that."""
    tried = subprocess.run([*OWN_LOOPBACK, "true"], capture_output=True)
    return OWN_LOOPBACK if tried.returncode == 0 else ()


def row(processes: int, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Sizes of what a process holds, and of its messages' whole tensors; on the wire is each process's mean."""
    median = {
        name: statistics.median(run[name] for run in runs) for name in ("wire", "step_seconds", "restart_seconds")
    }
    sizes = runs[0]["held"] | {"activations": runs[0]["activations"]}
    return {f"{name}_mib": size / MIB for name, size in sizes.items()} | {
        "messages_mib": {kind: size / MIB for kind, size in runs[0]["messages"].items() if size > FEW_BYTES},
        "sent_on_the_wire_mib": median["wire"] / processes / MIB,
        "ms_per_step": 1000 * median["step_seconds"],
        "seconds_from_restart_to_step": median["restart_seconds"],
        "single_runs": [1000 * run["step_seconds"] for run in runs],
    }
