"""Runs of train() that are measured: configured for speed, quiet, and each with accelerate as new."""

from __future__ import annotations

import contextlib
import io
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState, GradientState

from train import train
from trainers.engine.checkpoint.saver import Saver
from trainers.engine.config.config import RunConfig, load_config
from trainers.engine.run.run_folder import METRICS, read_lines
from trainers.engine.validation.validation import Validation

ROOT = Path(__file__).parents[2]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # where accelerate puts train()


def configured(config: str, folder: str, steps: int, overrides: list[str] = (), windows: int = 1) -> RunConfig:
    """A run that logs every so many steps, so many times after the first one, which warms up."""
    last = (1 + windows) * steps
    task = load_config(config, []).task
    quiet = [
        f"base.output_dir={folder}/run", f"base.max_train_steps={last}", f"base.logging_steps={steps}",
        "base.logger=none", "base.resume_from_checkpoint=null", "base.valid_steps=null", "base.validation_split=null",
        f"base.checkpointing_steps={last}", f"{task}.lr_scheduler=constant", f"{task}.lr_warmup_steps=null",
    ]  # fmt: skip
    return load_config(config, [*quiet, *overrides])


def examples_per_second(run: RunConfig) -> list[float]:
    """Of train(), by windows after the first: with data, averaging and logging, without validation and saves."""
    with quiet(), fresh_accelerate(), patch.object(Validation, "after_step"):  # a sampler's 1,000 steps
        folder = train(run)
    return logged(folder, "examples_per_second")[1:]


def logged(folder: Path, name: str) -> list[float]:
    """A metric of a run at its log lines."""
    return [line[name] for line in read_lines(folder / METRICS) if name in line]


def in_processes(module: str, arguments: list[str], processes: int, threads: int, alone: Sequence[str] = ()) -> None:
    """Runs a module in processes of so many threads, behind the command `alone`; RuntimeError where it fails."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    environment |= {} if torch.cuda.is_available() else {"ACCELERATE_USE_CPU": "true"}
    command = [*alone, sys.executable, *(torchrun if processes > 1 else []), "-m", module, *arguments]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    if run.returncode:
        raise RuntimeError(run.stderr)


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def in_turns(run: RunConfig, others: dict[str, Callable[[int], float]]) -> dict[str, list[float]]:
    """Examples per second by windows, of "diffloop" and of the others, which all meet the same machine.

    Whenever train() has logged, each of the others does as many steps, within a pause that train() does not count.
    """
    rates: dict[str, list[float]] = {name: [] for name in others}

    def take_turns(saving: Saver, steps_done: int) -> None:
        if steps_done % run.base.logging_steps == 0:
            for name, train_steps in others.items():
                rates[name].append(train_steps(run.base.logging_steps))

    with patch.object(Saver, "after_step", take_turns):
        ours = examples_per_second(run)
    return {"diffloop": ours} | {name: found[1:] for name, found in rates.items()}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the lines and bars of many runs."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


@contextlib.contextmanager
def fresh_accelerate() -> Iterator[None]:
    """Its state is global: the next run in this process starts anew."""
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def machine() -> dict[str, Any]:
    """What a measurement depends on, beside the command."""
    import diffusers

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return {
        "machine": f"{name}, {os.cpu_count()} cores",
        "load": [round(load, 1) for load in os.getloadavg()],
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
