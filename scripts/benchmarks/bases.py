"""Stable Diffusion pipelines with random weights in outputs/tests, to measure tasks that start from one."""

from __future__ import annotations

import secrets
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from scripts.benchmarks.runs import DEVICE, from_tests
from scripts.data.make_base import write_tokenizer
from trainers.common.model_files import Grid
from trainers.common.text_to_image.unet2d_condition import build_unet

PARTS: dict[str, dict[str, Any]] = {  # attention_head_dim is the number of heads: as wide as in the whole one
    "quarter": {"block_out_channels": (80, 160, 320, 320), "norm_num_groups": 16, "attention_head_dim": 2},
    "eighth": {"block_out_channels": (40, 80, 160, 160), "norm_num_groups": 8, "attention_head_dim": 1},
}


WHOLE = {  # the tests' family, the UNet's config, the side of its latents, and the widths of text encoders
    "whole": ("sd1", "unet_sd15", 64, (768,)),
    "whole xl": ("sdxl", "unet_sdxl", 128, (768, 1280)),
}
MAX_LENGTH = 77  # tokens of a caption


def stable_diffusion(size: str) -> Path:
    """The tests' smallest, one with a part of the widths of Stable Diffusion 1.5's UNet, the "whole", or "whole xl".

    The whole ones are written in half precision, 2.1 and 5.7 GB; of their text encoders there are two layers.
    """
    tests = from_tests("tiny_models")
    tiny = tests.model(WHOLE[size][0] if size in WHOLE else "sd1")
    folder = tiny if size == "smallest" else tiny.with_name(f"{tiny.name}-{size.split()[0]}")
    if not folder.is_dir():
        staging = tiny.with_name(f".tmp-{tiny.name}-{secrets.token_hex(4)}")
        shutil.copytree(tiny, staging)
        if size in WHOLE:
            write_whole(staging, *WHOLE[size][1:])
        else:
            settings = {"sample_size": 16, "cross_attention_dim": tests.TEXT_WIDTH} | PARTS[size]
            UNet2DConditionModel(**settings).save_pretrained(staging / "unet")
        staging.rename(folder)
    return folder


def write_whole(folder: Path, unet: str, latents: int, widths: tuple[int, ...]) -> None:
    """Replaces the networks by those of Stable Diffusion's size, and its tokenizers by ones of letters."""
    captions, xl = ["a handwritten three"], len(widths) == 2
    levels = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    scaling = {"scaling_factor": 0.13025, "force_upcast": True} if xl else {}
    sizes = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4}
    with DEVICE:  # where random numbers for billions of weights are drawn in a moment
        networks = {"unet": build_unet(unet, Grid(4, latents), sum(widths), widths[-1] if xl else None)}
        networks["vae"] = AutoencoderKL(**sizes, **levels, **scaling)
        for number, width in enumerate(widths):
            kind = CLIPTextModelWithProjection if number else CLIPTextModel
            text = CLIPTextConfig(
                hidden_size=width, intermediate_size=4 * width, num_attention_heads=width // 64, num_hidden_layers=2,
                projection_dim=width,
            )  # fmt: skip
            networks[f"text_encoder{'_2' * number}"] = kind(text)
    for name, network in networks.items():
        network.to(torch.float16).save_pretrained(folder / name)
    for name in ("tokenizer", "tokenizer_2")[: len(widths)]:
        shutil.rmtree(folder / name)
        write_tokenizer(folder / name, captions, MAX_LENGTH)
