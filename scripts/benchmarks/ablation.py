"""Measures what settings are worth: each change to plain float32, then all together; each run in its own process.

Task text_to_image with an eighth of the widths of Stable Diffusion 1.5's UNet, random weights, latents of 16 x 16. Peak
memory is that of the steps: of the GPU, or else of the process.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from contextlib import nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from scripts.benchmarks.bases import stable_diffusion
from scripts.benchmarks.runs import configured, examples_per_second, in_new_process, in_turns, logged, median_ratio

PLAIN, FUSED = "eager float32, optimizer not fused", "fused optimizer"
KNOBS = {
    "bf16": ["base.mixed_precision=bf16"],
    "channels_last": ["base.channels_last=true"],
    FUSED: [],
    "compile": ["base.compile=true"],
    "compile repeated blocks": ["base.compile=true", "base.compile_repeated_blocks=true"],
    "caches": ["base.center_crop=true", "text_to_image.cache_latents=memory", "text_to_image.cache_text=memory"],
    "batch 16": ["base.train_batch_size=16"],
}
KEPT = [*KNOBS["bf16"], *KNOBS["caches"], *KNOBS["batch 16"]]
TOGETHER = {
    "bf16, fused, caches, batch 16": KEPT,
    "the same with channels_last": [*KEPT, *KNOBS["channels_last"]],
    "the same with repeated blocks compiled": [*KEPT, *KNOBS["compile repeated blocks"]],
}


class NotFused(torch.optim.AdamW):
    """AdamW without the fused kernels that a run asks for; a class, as libraries derive theirs from it."""

    def __init__(self, groups: Any, **options: Any) -> None:
        super().__init__(groups, **options | {"fused": False})


def rows(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Medians of runs in turns: examples/s, their ratio to plain float32, peak memory in GiB."""
    changes: dict[str, list[str]] = {PLAIN: []} | KNOBS | TOGETHER
    sides = {
        name: partial(in_new_process, measure, name == FUSED or name in TOGETHER, options, asked.steps)
        for name, options in changes.items()
    }
    found = in_turns(sides, asked.pairs)
    rates = {name: [rate for rate, _ in runs] for name, runs in found.items()}
    return [
        {
            "change": name,
            "examples_per_second": statistics.median(rates[name]),
            "ratio": median_ratio(rates[name], rates[PLAIN]),
            "peak_memory_gib": statistics.median(memory for _, memory in runs),
            "runs": rates[name],
        }
        for name, runs in found.items()
    ]


def measure(fused: bool, options: list[str], steps: int) -> tuple[float, float]:
    fixed = [
        "base.resolution=64", "base.channels_last=false", "text_to_image.noise_offset=0",
        f"text_to_image.pretrained_model_name_or_path={stable_diffusion('eighth')}",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        run = configured("configs/tests/text_to_image.json", folder, steps, [*fixed, *options])
        with nullcontext() if fused else patch.object(torch.optim, "AdamW", NotFused):
            [rate] = examples_per_second(run)
        return rate, max(logged(run, "peak_memory_gib"))
