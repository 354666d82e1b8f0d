"""A LoRA step on a network of Stable Diffusion 1.5's shape: without caches, with caches, and the UNet alone.

Adapters of rank 16, pictures of 512 x 512, batch 1, each way in a process of its own; on a GPU in bf16. The first call
makes a base model with random weights, 3.7 GB in outputs/tests/sd1-whole.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from scripts.benchmarks.bases import stable_diffusion
from scripts.benchmarks.loop import LORA
from scripts.benchmarks.runs import DEVICE, configured, examples_per_second, in_new_process, in_turns, seconds_of

WAYS: dict[str, list[str]] = {
    "without caches": [],
    "caches on disk": ["lora.cache_latents=disk", "lora.cache_text=disk"],
}
PRECISION, DTYPE = ("bf16", torch.bfloat16) if DEVICE.type == "cuda" else ("no", torch.float32)


def tables(asked: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Medians of seconds per step and of peak memory, and the sizes of what is written."""
    sides = {"UNet forward and backward alone": partial(in_new_process, unet_alone, asked.steps)} | {
        f"LoRA step, {way}": partial(in_new_process, lora_steps, way, asked.steps) for way in WAYS
    }
    stable_diffusion("whole")
    rows = [
        {
            "side": side,
            "seconds_per_step": statistics.median(seconds for seconds, _, _ in runs),
            "peak_memory_gib": statistics.median(memory for _, memory, _ in runs),
            "mb_on_disk": runs[0][2],
        }
        for side, runs in in_turns(sides, asked.pairs).items()
    ]
    return {"lora": rows}


def lora_steps(way: str, steps: int) -> tuple[float, float, dict[str, float]]:
    """Median seconds of a step, peak memory in GiB, and sizes in MB: the caches are those of 4 pictures and 2 texts."""
    options = [
        *LORA, "lora.caption_dropout=0", "lora.use_ema=false", "lora.rank=16", "base.resolution=512",
        "base.center_crop=true", "base.train_batch_size=1", "base.max_train_samples=4", "lora.validation_prompts=[]",
        f"base.mixed_precision={PRECISION}", f"lora.pretrained_model_name_or_path={stable_diffusion('whole')}",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        run = configured("configs/tests/lora.json", folder, 1, [*options, *WAYS[way]], windows=steps)
        rates, written = examples_per_second(run), Path(run.base.output_dir)
        places = {
            "adapter": written / "pytorch_lora_weights.safetensors",
            "checkpoint": written / f"checkpoint-{steps + 1}",
        }
        places |= {path.name.partition("-")[0]: path for path in sorted(Path(folder).glob("encoder-cache/*"))}
        sizes = {name: size_of(place) for name, place in places.items()}
    return statistics.median(1 / rate for rate in rates), peak_gib(), sizes


def unet_alone(steps: int) -> tuple[float, float, dict[str, float]]:
    """The same of the frozen UNet's forward and backward to its input."""
    unet = UNet2DConditionModel.from_pretrained(stable_diffusion("whole") / "unet", torch_dtype=DTYPE)
    unet.requires_grad_(False).to(DEVICE).train()
    noisy = torch.randn(1, 4, 64, 64, device=DEVICE, dtype=DTYPE, requires_grad=True)
    text = torch.randn(1, 77, 768, device=DEVICE, dtype=DTYPE)

    def step() -> None:
        unet(noisy, 500, text).sample.float().square().mean().backward()

    step()
    return statistics.median(seconds_of(step, 1) for _ in range(steps)), peak_gib(), {}


def peak_gib() -> float:
    """Of the GPU where there is one, else of this process."""
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def size_of(path: Path) -> float:
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file()) / 1e6
