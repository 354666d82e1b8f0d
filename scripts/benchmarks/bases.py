"""Stable Diffusion pipelines with random weights, to measure tasks that start from one."""

from __future__ import annotations

import secrets
import shutil
from pathlib import Path

from diffusers import UNet2DConditionModel

from scripts.benchmarks.runs import from_tests

PARTS = {  # of the widths of Stable Diffusion 1.5's UNet; attention_head_dim is the number of heads: as wide as there
    "quarter": {"block_out_channels": (80, 160, 320, 320), "norm_num_groups": 16, "attention_head_dim": 2},
    "eighth": {"block_out_channels": (40, 80, 160, 160), "norm_num_groups": 8, "attention_head_dim": 1},
}


def stable_diffusion(size: str) -> Path:
    """The tests' smallest one, or one with a "quarter" or an "eighth" of the widths of Stable Diffusion 1.5's UNet."""
    tests = from_tests("tiny_models")
    tiny = tests.model("sd1")
    folder = tiny if size == "smallest" else tiny.with_name(f"sd1-{size}")
    if not folder.is_dir():
        staging = tiny.with_name(f".tmp-{size}-{secrets.token_hex(4)}")
        shutil.copytree(tiny, staging)
        unet = UNet2DConditionModel(sample_size=16, cross_attention_dim=tests.TEXT_WIDTH, **PARTS[size])
        unet.save_pretrained(staging / "unet")
        staging.rename(folder)
    return folder
