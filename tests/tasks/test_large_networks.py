"""The large shapes in configs/models: networks as large as they are known to be, built without memory."""

from __future__ import annotations

import pytest
import torch

from trainers.common.diffusion.dit_transformer import build_dit
from trainers.common.model_files import Grid
from trainers.common.text_to_image.unet2d_condition import build_unet


@pytest.mark.parametrize(
    ("build", "parameters"),
    [
        pytest.param(lambda: build_unet("unet_sd15", Grid(4, 64), 768), 859_520_964, id="Stable Diffusion 1.5"),
        pytest.param(lambda: build_unet("unet_sdxl", Grid(4, 128), 2048, 1280), 2_567_463_684, id="SDXL"),
        pytest.param(lambda: build_dit("dit_2b", None, Grid(4, 64), 1000), 1_983_682_576, id="DiT"),
    ],
)
def test_large_networks_have_the_size_they_are_known_by(build, parameters):
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in build().parameters()) == parameters
