"""UNet2DModels: from a folder, a JSON file, a name in configs/models, or a default that fits the resolution."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from trainers.common.model_files import Grid, Settings, load_pretrained, misfits, read_settings, settings_problems

if TYPE_CHECKING:
    from diffusers import UNet2DModel

LEVELS = 4  # resolution levels of a UNet2DModel by default


def default_unet2d(grid: Grid) -> Settings:
    """A config that halves the picture down to at most 8 pixels, with attention one level above the bottom."""
    levels = max(2, min(6, grid.resolution.bit_length() - 3))
    width = 64 if grid.resolution <= 32 else 128
    attention_level = levels - 2 if levels > 2 else levels - 1
    kinds = ["Attn" if level == attention_level else "" for level in range(levels)]
    return {
        "block_out_channels": [width * factor for factor in (1, 2, 2, 4, 4, 4)[:levels]],
        "layers_per_block": 2,
        "down_block_types": [f"{kind}DownBlock2D" for kind in kinds],
        "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(kinds)],
    }


def unet2d_problems(model_config: str | None, grid: Grid, decided: tuple[str, ...] = ()) -> Iterator[str]:
    """Yields why the network cannot work on the grid, without importing heavy libraries.

    Settings that the task has `decided`, such as out_channels, are not checked in the file.
    """
    read, fitting = partial(read_settings, model_config, default_unet2d, grid), dict.fromkeys(decided, grid.channels)
    return settings_problems("a UNet2DModel", read, lambda settings: misfits(settings | fitting, grid, LEVELS))


def build_unet2d(
    model_config: str | None, pretrained: str | None, grid: Grid, decided: Mapping[str, Any] = MappingProxyType({})
) -> UNet2DModel:
    """Builds the network in float32, with random weights or those of a folder (or its sub-folder `unet`).

    `decided` are settings of the task, such as `num_class_embeds`. Raises ValueError if pretrained weights do not fit
    them or the grid.
    """
    from diffusers import UNet2DModel

    if pretrained is None:
        return UNet2DModel.from_config({**read_settings(model_config, default_unet2d, grid), **decided})
    # channels decided by the task, such as those of a concatenated condition, need not equal the grid's
    fitting = dict.fromkeys(decided.keys() & {"in_channels", "out_channels"}, grid.channels)
    place = "pretrained_model_name_or_path", pretrained
    unet = load_pretrained(UNet2DModel, place, "unet", lambda c: misfits({**c, **fitting}, grid, LEVELS), decided)
    unet.register_to_config(sample_size=grid.resolution)
    return unet
