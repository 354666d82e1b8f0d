"""Measures what a save costs the loop, and the time from `latest` to the first step, by the size of the network."""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from scripts.benchmarks.runs import configured, examples_per_second, synchronize
from trainers.engine.checkpoint.manifest import list_checkpoints

CONFIG = "configs/ddpm_digits.yaml"
LARGE = {
    "sample_size": 32, "in_channels": 1, "out_channels": 1, "block_out_channels": [128, 256, 448, 576],
    "layers_per_block": 2, "down_block_types": ["DownBlock2D"] * 4, "up_block_types": ["UpBlock2D"] * 4,
}  # fmt: skip


def rows(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each of two sizes of network.

    A stall is the time of a step with the save after it, less that of a normal step: the median of the second half of
    the period, when the files are long written. The cost of a save in all is added up over the first half.
    """
    with tempfile.TemporaryDirectory() as folder:
        large = Path(folder, "large.json")
        large.write_text(json.dumps(LARGE))
        options = [f"ddpm.model_config={large}", "base.train_batch_size=1", "base.resolution=32"]
        return [
            {"network": name} | checkpoint_times(f"{folder}/{period}", overrides, asked.pairs, period)
            for name, overrides, period in (("the config's network", [], 20), ("large", options, 16))
        ]


def checkpoint_times(folder: str, overrides: list[str], repetitions: int, period: int) -> dict[str, Any]:
    """Saves every `period` steps; the first save, which also pays for its memory, does not count."""
    last = period * (repetitions + 2)
    options = [f"base.checkpointing_steps={period}", "base.checkpoints_total_limit=1", *overrides]
    options += ["ddpm.valid_batch_size=1", "ddpm.ddpm_num_inference_steps=1"]
    seconds = [b - a for a, b in pairwise(times(folder, last, options))]  # of each step with the save after it
    began = time.perf_counter()
    begin, _ = times(folder, last, [*options, f"base.max_train_steps={last + 1}", "base.resume_from_checkpoint=latest"])
    periods = [seconds[first - 1 : first - 1 + period] for first in range(2 * period, last, period)]
    half = period // 2
    normal = [statistics.median(each[half:]) for each in periods]
    sealed = list_checkpoints(Path(folder, "run"))[0][1]
    stalls = [each[0] - step for each, step in zip(periods, normal, strict=True)]
    in_all = [sum(each[:half]) - half * step for each, step in zip(periods, normal, strict=True)]
    return {
        "parameters": sum(tensor.numel() for tensor in load_file(next(sealed.glob("unet/*.safetensors"))).values()),
        "checkpoint_mb": round(sum(path.stat().st_size for path in sealed.rglob("*") if path.is_file()) / 2**20, 1),
        "step_seconds": statistics.median(normal),
        "stall_seconds": statistics.median(stalls),
        "stall_in_steps": statistics.median(stall / step for stall, step in zip(stalls, normal, strict=True)),
        "seconds_in_all": statistics.median(in_all),
        "seconds_to_first_step": begin - began,
        "stalls": stalls,
        "steps": normal,
    }


def times(folder: str, last: int, options: list[str]) -> list[float]:
    """The moment when a run's first step began, and those when each was done."""
    found: list[float] = []

    def look(validation: Any, steps_done: int) -> None:
        synchronize()
        found.append(time.perf_counter())

    examples_per_second(configured(CONFIG, folder, last, options, windows=0), look)
    return found
