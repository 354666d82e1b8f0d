"""The latents of a frozen autoencoder in place of pixels: how they are read, drawn and decoded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trainers.base import Encoder, RandomSource, Section
from trainers.common.autoencoder_config import find_subfolder, latent_grid, load_autoencoder
from trainers.common.model_files import Grid

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


def vae_config(source: str) -> dict[str, Any] | None:
    """The config of an autoencoder in a local folder; None for what must be a name on the hub."""
    path = Path(source) / (find_subfolder(source, None) or "") / "config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def latents_problems(source: str, base: Section) -> Iterator[str]:
    """Yields what is wrong with an option that names an autoencoder, as far as a local folder tells."""
    if vae_config(source) is None and Path(source).exists():
        yield "is a folder without config.json or vae/config.json; give a finished vae run"


class LatentSpace:
    """z = (x - shift) * scale of an AutoencoderKL's latents x, as its config says.

    Messages name the `option` which says where the autoencoder is.
    """

    def __init__(self, option: str, source: str, base: Section, device: torch.device, dtype: torch.dtype) -> None:
        self.option, self.source, self.device, self.dtype = option, source, device, dtype
        self.pictures = Grid.of(base)
        self.grid = latent_grid(vae_config(source) or self.vae.config, base.resolution)

    @cached_property
    def vae(self) -> AutoencoderKL:
        """The autoencoder; in float32 where its config says that half precision overflows."""
        vae = load_autoencoder(self.option, self.source, self.pictures)
        dtype = torch.float32 if vae.config.force_upcast else self.dtype
        return (vae if dtype == torch.float32 else vae.to(dtype)).to(self.device).eval().requires_grad_(False)

    def encoder(self) -> Encoder:
        """The stage that writes each picture's mean and log-variance."""
        return Encoder("image", ("mean", "logvar"), lambda: self.vae, encode, {"vae": self.source})

    def draw(self, batch: dict[str, Any], rng: RandomSource) -> Tensor:
        """Scaled latents [B, c, h, w] drawn from a batch's posteriors; ValueError where another network made them."""
        mean, logvar = batch["mean"], batch["logvar"]
        if mean.shape[1:] != self.shape:
            found = f"the data set's latents are {list(mean.shape[1:])}, its own {list(self.shape)}"
            raise ValueError(f"{self.option} = {self.source}: {found}; encode the data with this autoencoder")
        return self.scaled(mean + (logvar / 2).exp() * rng.normal("latent", self.shape))

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.grid.channels, self.grid.resolution, self.grid.resolution

    def scaled(self, latents: Tensor) -> Tensor:
        config = self.vae.config
        return (latents - (config.shift_factor or 0.0)) * config.scaling_factor

    @torch.no_grad()
    def decode(self, scaled: Tensor) -> Tensor:
        """Pixels [B, C, H, W] in [-1, 1], a little beyond where the decoder says so."""
        return decode(self.vae, scaled)


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> dict[str, Tensor]:
    """The posterior of pictures in [-1, 1], float32; the log-variance is clamped as diffusers does it."""
    posterior = vae.encode(images.to(vae.dtype)).latent_dist
    return {"mean": posterior.mean.float(), "logvar": posterior.logvar.float()}


def decode(vae: AutoencoderKL, scaled: Tensor) -> Tensor:
    """The pixels of scaled latents."""
    latents = scaled / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    return vae.decode(latents.to(vae.dtype)).sample.float()
