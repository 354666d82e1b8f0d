"""Pixel-space UNets: from a folder, a JSON file, a name in configs/models, or a default that fits the resolution."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainers.base import Section

if TYPE_CHECKING:
    from diffusers import UNet2DModel

MODELS_DIR = Path(__file__).parents[2] / "configs" / "models"


def find_model_config(model_config: str) -> Path:
    """The JSON file that `model_config` means; FileNotFoundError lists the places that were searched."""
    places = [Path(model_config) / "config.json", Path(model_config), MODELS_DIR / f"{model_config}.json"]
    for place in places:
        if place.is_file():
            return place
    names = ", ".join(sorted(path.stem for path in MODELS_DIR.glob("*.json")))
    searched = ", ".join(str(place) for place in places[:2])
    raise FileNotFoundError(f"no file at {searched}, and the names in configs/models are {names}")


def default_unet2d(resolution: int, channels: int) -> dict[str, Any]:
    """A network that halves the picture down to 8 or fewer pixels, with attention one level above the bottom."""
    levels = max(2, min(6, resolution.bit_length() - 3))
    width = 64 if resolution <= 32 else 128
    attention_level = levels - 2 if levels > 2 else levels - 1
    kinds = ["Attn" if level == attention_level else "" for level in range(levels)]
    return {
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": [width * factor for factor in (1, 2, 2, 4, 4, 4)[:levels]],
        "layers_per_block": 2,
        "down_block_types": [f"{kind}DownBlock2D" for kind in kinds],
        "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(kinds)],
    }


def unet2d_settings(model_config: str | None, base: Section) -> dict[str, Any]:
    """The network's config without diffusers' private keys; its sample size is the run's resolution."""
    if model_config is None:
        settings = default_unet2d(base.resolution, base.channels)
    else:
        settings = json.loads(find_model_config(model_config).read_text(encoding="utf-8"))
    return {key: value for key, value in settings.items() if not key.startswith("_")} | {"sample_size": base.resolution}


def unet2d_problems(model_config: str | None, base: Section, decided: tuple[str, ...] = ()) -> Iterator[str]:
    """Yields what keeps the network from working on the run's data, before anything heavy is loaded.

    What the task has `decided`, such as out_channels, the file need not say rightly.
    """
    try:
        settings = unet2d_settings(model_config, base)
    except (FileNotFoundError, ValueError, AttributeError) as error:
        yield f"must be a folder with config.json, a JSON file, or a name in configs/models: {error}"
        return
    try:
        yield from _misfits(settings | dict.fromkeys(decided, base.channels), base)
    except TypeError as error:
        yield f"is no config of a UNet2DModel: {error}"


def _misfits(settings: Mapping[str, Any], base: Section) -> Iterator[str]:
    for option in ("in_channels", "out_channels"):
        if settings.get(option, 3) != base.channels:
            yield f"has {option} = {settings.get(option, 3)}, base.channels is {base.channels}; make them equal"
    halvings = len(settings.get("block_out_channels", (0, 0, 0, 0))) - 1
    if base.resolution % 2**halvings:
        size = f"base.resolution = {base.resolution} must be a multiple of {2**halvings}"
        yield f"halves the picture {halvings} times; {size}"


def build_unet2d(
    model_config: str | None, pretrained: str | None, base: Section, settings: Mapping[str, Any] | None = None
) -> UNet2DModel:
    """Makes the network, with random weights or those of a folder (or its sub-folder `unet`), in float32.

    `settings` are what the task decides, such as `num_class_embeds`. Raises ValueError where pretrained weights do not
    fit them, base.channels or base.resolution.
    """
    import torch
    from diffusers import UNet2DModel

    if pretrained is None:
        return UNet2DModel.from_config(unet2d_settings(model_config, base) | dict(settings or {}))
    subfolder = None if (Path(pretrained) / "config.json").is_file() else "unet"
    try:
        unet = UNet2DModel.from_pretrained(
            pretrained, subfolder=subfolder, use_safetensors=True, torch_dtype=torch.float32
        )
    except OSError as error:
        raise FileNotFoundError(
            f"pretrained_model_name_or_path = {pretrained}: no UNet2DModel in safetensors format could be read; give a "
            f"local folder with config.json, or with unet/config.json, or a hub name that can be reached ({error})"
        ) from None
    decided = {"out_channels": base.channels} if "out_channels" in (settings or {}) else {}
    for misfit in _misfits({**unet.config, **decided}, base):
        raise ValueError(f"pretrained_model_name_or_path = {pretrained}: {misfit}")
    for name, value in (settings or {}).items():
        if unet.config.get(name) != value:
            found = f"has {name} = {unet.config.get(name)}, and this run needs {value}"
            raise ValueError(f"pretrained_model_name_or_path = {pretrained}: {found}")
    unet.register_to_config(sample_size=base.resolution)
    return unet
