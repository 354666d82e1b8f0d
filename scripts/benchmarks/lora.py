"""A LoRA step on a network of Stable Diffusion 1.5's shape: without caches, with caches, and the UNet alone.

Makes a base model with random weights (3.7 GB in a temporary folder) and trains adapters of rank 16 on pictures of
512 x 512, batch 1, each way in a process of its own; on a GPU in bf16.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

from scripts.benchmarks.runs import DEVICE, examples_per_second, in_new_process, in_turns, seconds_of
from scripts.data.make_base import NOISE, write_tokenizer
from trainers.common.model_files import Grid
from trainers.common.text_to_image.unet2d_condition import build_unet
from trainers.engine.config.config import check_config

WAYS = {"without caches": [], "caches on disk": ["lora.cache_latents=disk", "lora.cache_text=disk"]}
PICTURES = 4
PRECISION, DTYPE = ("bf16", torch.bfloat16) if DEVICE.type == "cuda" else ("no", torch.float32)


def tables(asked: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Medians of seconds per step and of peak memory, and sizes of the adapter, a checkpoint and a picture's caches."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_base(folder / "base")
        write_pictures(folder / "pictures")
        sides = {"UNet forward and backward alone": partial(in_new_process, unet_alone, folder, asked.steps)} | {
            f"LoRA step, {way}": partial(in_new_process, lora_steps, folder, way, asked.steps) for way in WAYS
        }
        found = in_turns(sides, asked.pairs)
    rows = [
        {
            "side": side,
            "seconds_per_step": statistics.median(seconds for seconds, _, _ in runs),
            "peak_memory_gib": statistics.median(memory for _, memory, _ in runs),
            "on_disk_mb": runs[0][2],
        }
        for side, runs in found.items()
    ]
    return {"lora": rows}


def write_base(folder: Path) -> None:
    """Random weights in the shapes of Stable Diffusion 1.5; its tokenizer's place takes one of letters."""
    levels = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    text = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
    StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, **levels),
        text_encoder=CLIPTextModel(text),
        tokenizer=write_tokenizer(folder / "letters", ["a photo of a cat"], text.max_position_embeddings),
        unet=build_unet("unet_sd15", Grid(4, 64), text.hidden_size),
        scheduler=DDIMScheduler(**NOISE, clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def write_pictures(folder: Path) -> None:
    folder.mkdir()
    for number in range(PICTURES):
        pixels = np.random.default_rng(number).integers(256, size=(64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((512, 512), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("a photo of a cat")


def lora_steps(folder: Path, way: str, steps: int) -> tuple[float, float, dict[str, float]]:
    """Median seconds of the steps after the first, peak memory in GiB, and sizes in MB."""
    base = {"train_data_dir": str(folder / "pictures"), "resolution": 512, "center_crop": True, "train_batch_size": 1}
    base |= {"mixed_precision": PRECISION, "max_train_steps": steps + 1, "logging_steps": 1, "logger": "none"}
    lora = {"pretrained_model_name_or_path": str(folder / "base"), "rank": 16, "lr_scheduler": "constant"}
    with tempfile.TemporaryDirectory(dir=folder) as own:
        document = {"base": base | {"output_dir": f"{own}/run"}, "lora": lora | {"validation_prompts": []}}
        rates = examples_per_second(check_config(document, WAYS[way]))
        sizes = {"adapter": size_of(Path(own, "run/pytorch_lora_weights.safetensors"))}
        sizes["checkpoint"] = size_of(Path(own, f"run/checkpoint-{steps + 1}"))
        for cache in sorted(Path(own).glob("encoder-cache/*")):
            sizes[f"{cache.name.partition('-')[0]} of a picture"] = size_of(cache) / PICTURES
    return statistics.median(1 / rate for rate in rates), peak_gib(), sizes


def unet_alone(folder: Path, steps: int) -> tuple[float, float, dict[str, float]]:
    """The same of the frozen UNet's forward and backward to its input."""
    unet = UNet2DConditionModel.from_pretrained(folder / "base" / "unet", torch_dtype=DTYPE).requires_grad_(False)
    unet.to(DEVICE).train()
    options = {"device": DEVICE, "dtype": DTYPE}
    noisy, text = torch.randn(1, 4, 64, 64, **options, requires_grad=True), torch.randn(1, 77, 768, **options)

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
