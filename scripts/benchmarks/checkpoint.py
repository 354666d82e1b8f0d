"""What a save costs the loop, and how long it takes from `latest` to the first step, by the size of the network."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

from scripts.benchmarks.runs import fresh_accelerate, synchronize
from train import train
from trainers.engine.checkpoint.manifest import list_checkpoints
from trainers.engine.config.config import load_config
from trainers.engine.optim import optimizer


def table(config: str, repetitions: int) -> list[dict[str, Any]]:
    """Seconds that a save stalls the loop, and from `latest` to the first step, for two sizes of network.

    A stall is the time between the step before a save and the step after it, without a normal step: the median of
    those that come when the files are long written. What a save costs in all is added over the steps up to those.
    """
    large = {
        "sample_size": 32, "in_channels": 1, "out_channels": 1, "block_out_channels": [128, 256, 448, 576],
        "layers_per_block": 2, "down_block_types": ["DownBlock2D"] * 4, "up_block_types": ["UpBlock2D"] * 4,
    }  # fmt: skip
    large_options = ["base.train_batch_size=1", "base.resolution=32"]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "large.json").write_text(json.dumps(large))
        return [
            {"network": name} | checkpoint_times(config, f"{folder}/{name}", overrides, repetitions, period)
            for name, overrides, period in (
                ("the config's network", [], 20),
                ("large", [f"ddpm.model_config={folder}/large.json", *large_options], 16),
            )
        ]


def checkpoint_times(config: str, folder: str, overrides: list[str], repetitions: int, period: int) -> dict:
    """One save every `period` steps; the first save pays for its memory and does not count."""
    starts = []  # of the steps
    original = optimizer.set_learning_rates

    def timed(*arguments) -> dict:
        synchronize()
        starts.append(time.perf_counter())
        return original(*arguments)

    optimizer.set_learning_rates = timed
    options = [
        f"base.output_dir={folder}", "ddpm.lr_scheduler=constant", "ddpm.lr_warmup_steps=null", "base.valid_steps=null",
        f"base.checkpointing_steps={period}", "base.checkpoints_total_limit=1", "base.resume_from_checkpoint=latest",
        "ddpm.valid_batch_size=1", "ddpm.ddpm_num_inference_steps=1", "base.validation_split=null", *overrides,
    ]  # fmt: skip
    last = period * (repetitions + 2)
    try:
        with fresh_accelerate():
            train(load_config(config, [*options, f"base.max_train_steps={last}"]))
        seconds = np.diff(starts).tolist()  # from the start of a step to that of the next one, a save included
        starts.clear()
        began = time.perf_counter()
        with fresh_accelerate():
            train(load_config(config, [*options, f"base.max_train_steps={last + 1}"]))
    finally:
        optimizer.set_learning_rates = original
    periods = [seconds[first - 1 : first - 1 + period] for first in range(2 * period, last, period)]
    half = period // 2
    normal = [statistics.median(each[half:]) for each in periods]
    sealed = list_checkpoints(Path(folder))[0][1]
    stalls = [each[0] - step for each, step in zip(periods, normal, strict=True)]
    in_all = [sum(each[:half]) - half * step for each, step in zip(periods, normal, strict=True)]
    return {
        "parameters": sum(tensor.numel() for tensor in load_file(next(sealed.glob("unet/*.safetensors"))).values()),
        "checkpoint_mb": round(sum(path.stat().st_size for path in sealed.rglob("*") if path.is_file()) / 2**20, 1),
        "step_seconds": statistics.median(normal),
        "stall_seconds": statistics.median(stalls),
        "stall_in_steps": statistics.median(stall / step for stall, step in zip(stalls, normal, strict=True)),
        "seconds_in_all": statistics.median(in_all),
        "seconds_to_first_step": starts[0] - began,
        "stalls": stalls,
        "steps": normal,
    }
