"""The runs of realistic sizes that gpu.py measures: random weights, pictures of noise."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from scripts.benchmarks.bases import stable_diffusion
from scripts.benchmarks.on_gpu.pictures import DATASET
from scripts.benchmarks.on_gpu.section import Asked

DIT_XL_2 = {"patch_size": 2, "num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72}
BF16 = ["base.mixed_precision=bf16"]


class Shape(NamedTuple):
    """A run to measure: its config, options, and the steps of a window."""

    config: str
    options: Callable[[], list[str]]  # which may make the base model
    window: int
    aim: tuple[float, float] | None = None  # images per second at least, GiB at most


def tiny_shapes() -> dict[str, Shape]:
    return {
        "DDPM": Shape("configs/tests/ddpm.json", lambda: BF16, 2),
        "LoRA": Shape("configs/tests/lora.json", partial(lora_options, "smallest", 32, 2), 2),
    }


def real_shapes(asked: Asked) -> dict[str, Shape]:
    """The first is the one of CIFAR-10, which is compared with a plain script too."""
    dit = asked.folder / "dit_xl_2.json"
    dit.write_text(json.dumps(DIT_XL_2), encoding="utf-8")
    cifar = [*pictures(10_000, 32), *BF16, "ddpm.model_config=unet_cifar10", "base.train_batch_size=128"]
    latents = [*pictures(2_000, 32, channels=4, classes=1000), *BF16, f"dit.model_config={dit}"]
    latents += ["base.train_batch_size=64"]
    lora, whole = "configs/tests/lora.json", "configs/tests/text_to_image.json"
    return {
        "DDPM of CIFAR-10's shape, batch 128": Shape("configs/tests/ddpm.json", lambda: cifar, 30),
        "LoRA SD 1.5, batch 1": Shape(lora, partial(lora_options, "whole", 512, 1), 20, (11.0, 3.0)),
        "LoRA SD 1.5, batch 4": Shape(lora, partial(lora_options, "whole", 512, 4), 12),
        "fine-tune SD 1.5, batch 16": Shape(whole, partial(whole_options, 16), 6),
        "fine-tune SD 1.5, batch 32": Shape(whole, partial(whole_options, 32), 4, (75.0, math.inf)),
        "DiT-XL/2 at 256 px (its latents), batch 64": Shape("configs/tests/dit.json", lambda: latents, 8),
        "LoRA SDXL 1024 px, batch 1": Shape(lora, partial(lora_options, "whole xl", 1024, 1), 8),
    }


def saving_shape(tiny: bool) -> Shape:
    options = partial(whole_options, 2, "smallest", 32) if tiny else partial(whole_options, 32)
    return Shape("configs/tests/text_to_image.json", options, 6)


def pictures(count: int, resolution: int, channels: int = 3, classes: int = 0) -> list[str]:
    return [
        f"base.dataset={DATASET}", f"base.dataset_args={{count: {count}, classes: {classes}}}",
        "base.max_train_samples=null", f"base.resolution={resolution}", f"base.channels={channels}",
    ]  # fmt: skip


def lora_options(size: str, resolution: int, batch: int) -> list[str]:
    """Adapters of rank 16 in the UNet alone, everything cached."""
    return [
        *pictures(8, resolution), *BF16, *cached("lora"), f"base.train_batch_size={batch}", "lora.rank=16",
        "lora.train_text_encoder=false", "lora.learning_rate=1e-4", "lora.lora_dropout=0", "lora.snr_gamma=null",
        "lora.caption_dropout=0", "lora.use_ema=false", f"lora.pretrained_model_name_or_path={stable_diffusion(size)}",
    ]  # fmt: skip


def whole_options(batch: int, size: str = "whole", resolution: int = 512) -> list[str]:
    return [
        *pictures(8, resolution), *BF16, *cached("text_to_image"), f"base.train_batch_size={batch}",
        "text_to_image.caption_dropout=0", "text_to_image.noise_offset=0",
        f"text_to_image.pretrained_model_name_or_path={stable_diffusion(size)}",
    ]  # fmt: skip


def cached(task: str) -> list[str]:
    return ["base.center_crop=true", f"{task}.cache_latents=memory", f"{task}.cache_text=memory"]
