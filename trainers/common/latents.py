"""The latents of a frozen autoencoder in place of pixels: how they are read, drawn and decoded."""

from __future__ import annotations

import hashlib
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


def latents_problems(source: str) -> Iterator[str]:
    """Yields what is wrong with an option that names an autoencoder, as far as a local folder tells."""
    settings = vae_config(source)
    if settings is None and Path(source).exists():
        yield "must be a finished vae run: a folder with config.json or vae/config.json"
    if settings is not None and settings.get("scaling_factor", 1) is None:
        yield "its scaling_factor is not known yet: give the finished run, not one of its checkpoints"


class LatentSpace:
    """z = (x - shift) * scale of an AutoencoderKL's latents x, as its config says.

    Messages name the `option` which says where the autoencoder is. Raises ValueError where `encoded_by`, the digest of
    the network that encoded the data, is another's.
    """

    def __init__(
        self,
        option: str,
        source: str,
        base: Section,
        device: torch.device,
        dtype: torch.dtype,
        encoded_by: str | None = None,
    ) -> None:
        self.option, self.source, self.device, self.dtype = option, source, device, dtype
        self.pictures = Grid.of(base)
        self.grid = latent_grid(vae_config(source) or self.vae.config, base.resolution)
        if encoded_by is not None and encoded_by != self.digest:
            raise ValueError(
                f"{option} = {source}: the data set was encoded by another network; encode it with this one"
            )

    @cached_property
    def vae(self) -> AutoencoderKL:
        """The autoencoder; in float32 where its config says that half precision overflows."""
        vae = self.load()
        dtype = torch.float32 if vae.config.force_upcast else self.dtype
        return (vae if dtype == torch.float32 else vae.to(dtype)).to(self.device).eval().requires_grad_(False)

    def load(self) -> AutoencoderKL:
        """A copy in float32 on the CPU."""
        return load_autoencoder(self.option, self.source, self.pictures)

    @cached_property
    def digest(self) -> str:
        """16 hex digits that identify the autoencoder's weights."""
        content = hashlib.sha256()
        for name, weights in sorted(self.load().state_dict().items()):
            content.update(name.encode() + weights.numpy().tobytes())
        return content.hexdigest()[:16]

    def encoder(self) -> Encoder:
        """The stage that writes each picture's mean and log-variance."""
        return Encoder("image", ("mean", "logvar"), lambda: self.vae, encode, {"vae": self.source})

    def draw(self, batch: dict[str, Any], rng: RandomSource) -> Tensor:
        """Scaled latents [B, c, h, w] drawn from a batch's posteriors."""
        mean, logvar = batch["mean"], batch["logvar"]
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


def images_of(batch: dict[str, Any]) -> Tensor:
    """The pictures [B, C, H, W] of a batch; ValueError for latents."""
    if "image" not in batch:
        raise ValueError("the data set holds latents, and this run needs pictures; conditional_ddpm.vae takes latents")
    return batch["image"]


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> dict[str, Tensor]:
    """The posterior of pictures in [-1, 1], float32; the log-variance is clamped as diffusers does it."""
    posterior = vae.encode(images.to(vae.dtype)).latent_dist
    return {"mean": posterior.mean.float(), "logvar": posterior.logvar.float()}


def decode(vae: AutoencoderKL, scaled: Tensor) -> Tensor:
    """The pixels of scaled latents."""
    latents = scaled / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    return vae.decode(latents.to(vae.dtype)).sample.float()
