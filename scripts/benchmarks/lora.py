"""A LoRA step on a network of Stable Diffusion 1.5's shape: without caches, with caches, and the UNet alone.

Adapters of rank 16, pictures of 512 x 512, batch 1, each in its own process; on a GPU in bf16. The first call makes a
base model with random weights, 2 GB in outputs/tests/sd1-1-whole.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from scripts.benchmarks.bases import stable_diffusion
from scripts.benchmarks.loop import LORA
from scripts.benchmarks.runs import (
    DEVICE,
    configured,
    examples_per_second,
    in_new_process,
    in_turns,
    logged,
    seconds_of,
)
from trainers.engine.tracking.meters import take_peak_memory

WAYS: dict[str, list[str]] = {
    "without caches": [],
    "caches on disk": ["lora.cache_latents=disk", "lora.cache_text=disk"],
}
PRECISION, DTYPE = ("bf16", torch.bfloat16) if DEVICE.type == "cuda" else ("no", torch.float32)


def rows(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Medians of seconds per step and of peak memory, and the sizes of the files that are written."""
    sides = {"UNet forward and backward alone": partial(in_new_process, unet_alone, asked.steps)} | {
        f"LoRA step, {way}": partial(in_new_process, lora_steps, way, asked.steps) for way in WAYS
    }
    stable_diffusion("whole")
    return [
        {
            "side": side,
            "seconds_per_step": statistics.median(seconds for seconds, _, _ in runs),
            "peak_memory_gib": statistics.median(memory for _, memory, _ in runs),
            "mb_on_disk": runs[0][2],
        }
        for side, runs in in_turns(sides, asked.pairs).items()
    ]


def lora_steps(way: str, steps: int) -> tuple[float, float, dict[str, float]]:
    """Median seconds of a step, its peak memory in GiB, and sizes in MB: caches are of 4 pictures and 2 texts."""
    options = [
        *LORA, "lora.caption_dropout=0", "lora.use_ema=false", "lora.rank=16", "base.resolution=512",
        "base.center_crop=true", "base.train_batch_size=1", "base.max_train_samples=4", "lora.validation_prompts=[]",
        f"base.mixed_precision={PRECISION}", f"lora.pretrained_model_name_or_path={stable_diffusion('whole')}",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        run = configured("configs/tests/lora.json", folder, 1, [*options, *WAYS[way]], windows=steps)
        rates, written = examples_per_second(run), Path(run.base.output_dir)
        files = [written / "pytorch_lora_weights.safetensors", written / f"checkpoint-{steps + 1}"]
        files += sorted(Path(folder).glob("encoder-cache/*"))
        sizes = {path.name.partition("-")[0]: size_of(path) for path in files}
    return statistics.median(1 / rate for rate in rates), max(logged(run, "peak_memory_gib")), sizes


def unet_alone(steps: int) -> tuple[float, float, dict[str, float]]:
    """The same for the frozen UNet's forward pass and its backward pass to the input."""
    unet = UNet2DConditionModel.from_pretrained(
        stable_diffusion("whole") / "unet", torch_dtype=DTYPE, use_safetensors=True
    )
    unet.requires_grad_(False).to(DEVICE).train()
    noisy = torch.randn(1, 4, 64, 64, device=DEVICE, dtype=DTYPE, requires_grad=True)
    text = torch.randn(1, 77, 768, device=DEVICE, dtype=DTYPE)

    def step() -> None:
        unet(noisy, 500, text).sample.float().square().mean().backward()

    step()
    take_peak_memory(DEVICE)  # the start, too, has a peak
    return statistics.median(seconds_of(step, 1) for _ in range(steps)), take_peak_memory(DEVICE), {}


def size_of(path: Path) -> float:
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file()) / 1e6
