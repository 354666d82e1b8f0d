"""Measures each setting on the card: a fine-tune of Stable Diffusion 1.5's shape, one setting more in each row."""

from __future__ import annotations

import statistics
from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from scripts.benchmarks.ablation import NotFused
from scripts.benchmarks.bases import stable_diffusion
from scripts.benchmarks.on_gpu.section import Asked, Case, if_it_fits
from scripts.benchmarks.on_gpu.shapes import pictures
from scripts.benchmarks.runs import Enough, configured, examples_per_second, logged

WINDOW, WINDOWS = 5, 2  # steps
NOT_FUSED = "eager float32, optimizer not fused"
# each is added to those above it
KNOBS: dict[str, list[str]] = {
    NOT_FUSED: ["base.channels_last=false"],
    "TF32": ["base.allow_tf32=true"],
    "bf16": ["base.mixed_precision=bf16"],
    "channels_last": ["base.channels_last=true"],
    "fused optimizer": [],
    "caches": ["text_to_image.cache_latents=memory", "text_to_image.cache_text=memory"],
    "batch 16": ["base.train_batch_size=16"],
    "batch 32": ["base.train_batch_size=32"],
    "repeated blocks compiled": ["base.compile=true", "base.compile_repeated_blocks=true"],
}


def cases(asked: Asked) -> dict[str, Case]:
    options: list[str] = []
    found: dict[str, Case] = {}
    rates: list[float] = []
    for name, added in KNOBS.items():
        options = [*options, *added]
        fused = list(KNOBS).index(name) >= list(KNOBS).index("fused optimizer")
        if not (asked.tiny and "base.compile=true" in added):
            found[name] = partial(if_it_fits, partial(row, asked, name, options, fused, rates))
    return found


def row(asked: Asked, name: str, options: list[str], fused: bool, rates: list[float]) -> dict[str, Any]:
    size, resolution = ("smallest", 32) if asked.tiny else ("whole", 512)
    fixed = [
        *pictures(8, resolution), "base.center_crop=true", "base.train_batch_size=4", "text_to_image.caption_dropout=0",
        "text_to_image.noise_offset=0", f"text_to_image.pretrained_model_name_or_path={stable_diffusion(size)}",
        "base.checkpointing_steps=1000",
    ]  # fmt: skip
    window, windows = (1, 1) if asked.tiny else (WINDOW, WINDOWS)
    place = "configs/tests/text_to_image.json", asked.run_folder(name)
    run = configured(*place, window, [*fixed, *options], windows + 1)

    def look(validation: Any, steps_done: int) -> None:
        if steps_done == (1 + windows) * window:
            raise Enough

    with ExitStack() as patches:
        if not fused:
            patches.enter_context(patch.object(torch.optim, "AdamW", NotFused))
        rates.append(statistics.median(examples_per_second(run, look)))
    memory = max(logged(run, "peak_memory_gib"))
    return {"images_per_second": rates[-1], "ratio": rates[-1] / rates[0], "memory_gib": memory}
