"""UNet2DConditionModels with random weights, by a config: a folder, a JSON file, or a name in configs/models."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from datasets_lib.errors import InputError
from trainers.common.model_files import Grid, Settings, read_file, settings_problems

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


def unet_problems(model_config: str) -> Iterator[str]:
    """Yields problems of a UNet's config, without importing heavy libraries."""
    return settings_problems("a UNet2DConditionModel", partial(read_file, model_config), lambda settings: iter(()))


def build_unet(
    model_config: str, latents: Grid, text_width: int, pooled_width: int | None = None
) -> UNet2DConditionModel:
    """Builds the network with random weights, for these latents and text embeddings of this width.

    With `pooled_width` it is a network of Stable Diffusion XL, with sizes and a pooled text embedding as further
    inputs. Raises ValueError if the file contradicts.
    """
    from diffusers import UNet2DConditionModel

    decided: Settings = {
        "in_channels": latents.channels,
        "out_channels": latents.channels,
        "cross_attention_dim": text_width,
    }
    settings = read_file(model_config)
    decided["addition_embed_type"] = None if pooled_width is None else "text_time"
    if pooled_width is not None:
        settings["addition_time_embed_dim"] = settings.get("addition_time_embed_dim") or 256
        decided["projection_class_embeddings_input_dim"] = pooled_width + 6 * settings["addition_time_embed_dim"]
    for name, value in decided.items():
        if settings.get(name) not in (None, value):
            found = f"has {name} = {settings[name]}, and the base model's other parts need {value}"
            raise InputError(f"text_to_image.model_config = {model_config}: {found}; leave it out, or make them equal")
    return UNet2DConditionModel.from_config(settings | decided | {"sample_size": latents.resolution})
