"""Runs of train() that are measured: configured for speed, quiet, and each with accelerate as new."""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState, GradientState

from train import train
from trainers.engine.config import RunConfig, load_config
from trainers.engine.validation import Validation

WARM_UP_STEPS = 20  # the first window of a run pays for allocations


def configured(config: str, folder: str, steps: int, overrides: list[str] = ()) -> RunConfig:
    """A run of so many steps after the warm-up, which logs after each half of them."""
    first, second = WARM_UP_STEPS, max(steps // 2, 1)
    task = load_config(config, []).task
    quiet = [
        f"base.output_dir={folder}/run", f"base.max_train_steps={first + 2 * second}", f"base.logging_steps={second}",
        "base.logger=none", "base.resume_from_checkpoint=null", "base.valid_steps=null", "base.validation_split=null",
        f"base.checkpointing_steps={first + 2 * second}", f"{task}.lr_scheduler=constant",
        f"{task}.lr_warmup_steps=null",
    ]  # fmt: skip
    return load_config(config, [*quiet, *overrides])


def examples_per_second(run: RunConfig) -> float:
    """Of a run of train(), with data, averaging and logging, after its warm-up; without start, validation and saves."""
    with quiet(), fresh_accelerate(), patch.object(Validation, "after_step"):  # a sampler's 1,000 steps
        folder = train(run)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rates = [x["examples_per_second"] for x in lines if "loss" in x and x["step"] > WARM_UP_STEPS]
    return statistics.harmonic_mean(rates)  # windows of equal numbers of examples


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
