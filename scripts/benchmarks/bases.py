"""Stable Diffusion pipelines with random weights in outputs/tests, to measure tasks that start from one."""

from __future__ import annotations

import secrets
import shutil
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from scripts.benchmarks.runs import from_tests
from scripts.data.make_base import write_tokenizer

PARTS: dict[str, dict[str, Any]] = {  # attention_head_dim is the number of heads: as wide as in the whole one
    "whole": {"sample_size": 64, "cross_attention_dim": 768},
    "quarter": {"block_out_channels": (80, 160, 320, 320), "norm_num_groups": 16, "attention_head_dim": 2},
    "eighth": {"block_out_channels": (40, 80, 160, 160), "norm_num_groups": 8, "attention_head_dim": 1},
}


def stable_diffusion(size: str) -> Path:
    """The tests' smallest, one with a part of the widths of Stable Diffusion 1.5's UNet, or the "whole" (3.7 GB)."""
    tests = from_tests("tiny_models")
    tiny = tests.model("sd1")
    folder = tiny if size == "smallest" else tiny.with_name(f"sd1-{size}")
    if not folder.is_dir():
        staging = tiny.with_name(f".tmp-{size}-{secrets.token_hex(4)}")
        shutil.copytree(tiny, staging)
        settings = {"sample_size": 16, "cross_attention_dim": tests.TEXT_WIDTH} | PARTS[size]
        UNet2DConditionModel(**settings).save_pretrained(staging / "unet")
        if size == "whole":
            write_encoders(staging)
        staging.rename(folder)
    return folder


def write_encoders(folder: Path) -> None:
    """Stable Diffusion 1.5's autoencoder and text encoder, and a tokenizer of letters instead of its own."""
    levels = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, **levels)
    vae.save_pretrained(folder / "vae")
    text = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
    CLIPTextModel(text).save_pretrained(folder / "text_encoder")
    shutil.rmtree(folder / "tokenizer")
    write_tokenizer(folder / "tokenizer", ["a handwritten three"], text.max_position_embeddings)
