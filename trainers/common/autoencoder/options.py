"""Autoencoders from a folder, a JSON file, a name in configs/models, or a default that fits the resolution."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainers.common.model_files import Grid, Settings, load_pretrained, misfits, read_settings, settings_problems

if TYPE_CHECKING:
    from trainers.common.autoencoder.autoencoder import AutoencoderKL

ALLOWED = (
    "lpips (VGG16, downloaded by torchvision), lpips:FILE with torchvision's weights of vgg16, NAME:FILE with those of "
    "another torchvision network, such as resnet50:resnet50.pth, or ms_ssim, which needs no weights"
)
SSIM_WINDOW = 11  # pixels; a picture must be larger at every scale
LEVELS = 1  # resolution levels of an AutoencoderKL by default


def default_autoencoder(grid: Grid) -> Settings:
    """Stable Diffusion's config, with latents 8 times smaller; narrower below 128 pixels, 4 times below 64."""
    width = 128 if grid.resolution >= 128 else 32
    factors = (1, 2, 4, 4) if grid.resolution >= 64 else (1, 2, 4)
    return {
        "latent_channels": 4,
        "block_out_channels": [width * factor for factor in factors],
        "down_block_types": ["DownEncoderBlock2D"] * len(factors),
        "up_block_types": ["UpDecoderBlock2D"] * len(factors),
        "layers_per_block": 2,
    }


def latent_grid(settings: Mapping[str, Any], resolution: int) -> Grid:
    """The grid of the latents of square pictures, by an AutoencoderKL's config."""
    halvings = len(settings.get("block_out_channels", (0,) * LEVELS)) - 1
    source = ("the autoencoder's latent_channels", "the latents' size")
    return Grid(settings.get("latent_channels", 4), resolution >> halvings, source)


def autoencoder_problems(model_config: str | None, grid: Grid) -> Iterator[str]:
    """Yields why the network cannot work on the grid, without importing heavy libraries."""
    read = partial(read_settings, model_config, default_autoencoder, grid)
    return settings_problems("an AutoencoderKL", read, partial(misfits, grid=grid, levels=LEVELS))


def perceptual_problem(spec: str, channels: int, resolution: int) -> str | None:
    """Returns the problem of a `perceptual_loss`, or None; loads no weights."""
    if spec == "ms_ssim":
        return None if resolution > SSIM_WINDOW else f"ms_ssim needs a base.resolution of more than {SSIM_WINDOW}"
    name, _, file = spec.partition(":")
    if channels not in (1, 3):
        return f"{name} sees grey or coloured pictures, and base.channels is {channels}; take ms_ssim"
    if name != "lpips" and not file:
        return f"must be one of: {ALLOWED}"
    if file and not Path(file).is_file():
        return f"no file {file}; give the weights as .pth or .safetensors; allowed: {ALLOWED}"
    if name == "lpips":
        return None
    from torchvision import models

    known = set(models.list_models(module=models))
    known = {name for name in known if not name.startswith(("vit", "swin", "maxvit"))}  # no rows [B, C, H, W]
    return None if name in known else f"{name} is no convolutional network of torchvision; allowed: {ALLOWED}"


def smallest_picture(discriminator_layers: int) -> int:
    """The smallest side, in pixels, from which a PatchDiscriminator computes a logit."""
    return 3 * 2**discriminator_layers


def find_subfolder(pretrained: str, subfolder: str | None) -> str | None:
    """Returns the given sub-folder, or `vae` if only that folder of a local pipeline has a config.json."""
    here, below = (Path(pretrained) / name / "config.json" for name in ("", "vae"))
    return "vae" if subfolder is None and not here.is_file() and below.is_file() else subfolder


def build_autoencoder(model_config: str | None, grid: Grid) -> AutoencoderKL:
    """Builds the network with random weights."""
    from trainers.common.autoencoder.autoencoder import AutoencoderKL

    return AutoencoderKL.from_config(read_settings(model_config, default_autoencoder, grid))


def load_autoencoder(
    option: str,
    pretrained: str,
    grid: Grid,
    subfolder: str | None = None,
    revision: str | None = None,
    trainable: bool = False,
    variant: str | None = None,
) -> AutoencoderKL:
    """Reads the network from a folder or the hub, in float32; a trainable one has our forward for training.

    Raises FileNotFoundError if nothing can be read, ValueError if it does not fit; messages name the `option`.
    """
    import diffusers

    from trainers.common.autoencoder.autoencoder import AutoencoderKL

    kind = AutoencoderKL if trainable else diffusers.AutoencoderKL
    options: dict[str, Any] = {"subfolder": find_subfolder(pretrained, subfolder), "revision": revision}
    options |= {"low_cpu_mem_usage": False} | ({"variant": variant} if variant else {})
    return load_pretrained(kind, (option, pretrained), "vae", partial(misfits, grid=grid, levels=LEVELS), **options)
