"""The latents of a frozen autoencoder in place of pixels: how they are read, drawn and decoded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trainers.base import BaseConfig, CacheKind, Encoder, RandomSource
from trainers.common.autoencoder.options import find_subfolder, latent_grid, load_autoencoder
from trainers.common.model_files import Grid, files_digest

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


def cache_problems(caches: Mapping[str, CacheKind | None], base: BaseConfig) -> Iterator[tuple[str, str]]:
    """Yields (option, problem) for caches of which every example would need another entry than the one that is kept."""
    if caches["cache_latents"] is not None and not base.center_crop:
        yield "cache_latents", "keeps one crop of each picture: set base.center_crop: true"
    for option, cache in caches.items():
        if base.streaming and cache is not None:
            reason = "keeps what is known before the first step, and with base.streaming nothing is; set it to null"
            yield option, reason


class LatentSpace:
    """z = (x - shift) * scale of an AutoencoderKL's latents x, as its config says.

    Messages name the `option` which says where the autoencoder is. Raises ValueError where `encoded_by`, the digest of
    the network that encoded the data, is another's.
    """

    offloaded = False  # whether the autoencoder leaves the device when it is not in use

    def __init__(
        self,
        option: str,
        source: str,
        base: BaseConfig,
        device: torch.device,
        dtype: torch.dtype,
        encoded_by: str | None = None,
        variant: str | None = None,
    ) -> None:
        self.option, self.source, self.device, self.dtype = option, source, device, dtype
        self.variant = variant
        self.pictures = Grid.of(base)
        self.settings = vae_config(source) or self._settings_on_hub()
        self.grid = latent_grid(self.settings, base.resolution)
        if base.buckets and base.bucket_step % self.factor:
            factor = f"must be a multiple of {self.factor}, the pixels per latent of {option}"
            raise ValueError(f"base.bucket_step = {base.bucket_step}: {factor}")
        if encoded_by is not None and encoded_by != self.digest:
            raise ValueError(
                f"{option} = {source}: the data set was encoded by another network; encode it with this one"
            )

    def _settings_on_hub(self) -> dict[str, Any]:
        """The config as it is written, without defaults."""
        from diffusers import AutoencoderKL

        try:
            return AutoencoderKL.load_config(self.source)
        except OSError:
            return dict(self.load().config)  # which says what is wrong

    @cached_property
    def vae(self) -> AutoencoderKL:
        """The autoencoder; in float32 where its config says that half precision overflows."""
        vae = self.load()
        vae = vae if self.vae_dtype == vae.dtype else vae.to(self.vae_dtype)  # diffusers warns of a dtype, any dtype
        return vae.to(self.device).eval().requires_grad_(False)

    @property
    def vae_dtype(self) -> torch.dtype:
        """As the file says: where it is silent, diffusers would say yes."""
        return torch.float32 if self.settings.get("force_upcast") else self.dtype

    def load(self) -> AutoencoderKL:
        """A copy in float32 on the CPU."""
        return load_autoencoder(self.option, self.source, self.pictures, variant=self.variant)

    @cached_property
    def digest(self) -> str:
        """16 hex digits that identify the autoencoder's weights."""
        content = hashlib.sha256()
        for name, weights in sorted(self.load().state_dict().items()):
            content.update(name.encode() + weights.numpy().tobytes())
        return content.hexdigest()[:16]

    def encoder(self, cache: CacheKind | None = None, column: str = "") -> Encoder:
        """The stage that writes the mean and log-variance of each picture of `image`, or `<column>image`."""

        def write(vae: AutoencoderKL, images: Tensor) -> dict[str, Tensor]:
            return {f"{column}{name}": rows for name, rows in encode(vae, images).items()}

        def source() -> dict[str, Any]:
            folder = Path(self.source) / (find_subfolder(self.source, None) or "")
            digest = files_digest(folder) if folder.is_dir() else self.digest
            return {"vae": digest, "variant": self.variant, "dtype": str(self.vae_dtype)}

        writes = (f"{column}mean", f"{column}logvar")
        optional = column != ""  # such as pictures of a class: training examples alone have them
        return Encoder(f"{column}image", writes, lambda: self.vae, write, source, cache, optional=optional)

    def draw(self, batch: dict[str, Any], rng: RandomSource, column: str = "") -> Tensor:
        """Scaled latents [B, c, h, w] drawn from a batch's posteriors, `column` in front of their names."""
        mean, logvar = batch[f"{column}mean"].float(), batch[f"{column}logvar"].float()
        return self.scaled(mean + (logvar / 2).exp() * rng.normal(f"{column}latent", mean.shape[1:]))

    def offload(self) -> None:
        """Takes the autoencoder off the device, where it is needed at validations only."""
        if self.offloaded:
            self.vae.to("cpu")

    @property
    def factor(self) -> int:
        """Pixels per latent, along a side."""
        return self.pictures.resolution // self.grid.resolution

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.grid.channels, self.grid.resolution, self.grid.resolution

    def scaled(self, latents: Tensor) -> Tensor:
        return (latents - (self.settings.get("shift_factor") or 0.0)) * self.settings.get("scaling_factor", 0.18215)

    @torch.no_grad()
    def decode(self, scaled: Tensor) -> Tensor:
        """Pixels [B, C, H, W] in [-1, 1], a little beyond where the decoder says so."""
        return decode(self.vae.to(self.device), scaled)


def images_of(batch: dict[str, Any]) -> Tensor:
    """The pictures [B, C, H, W] of a batch; ValueError for latents."""
    if "image" not in batch:
        raise ValueError(
            "the data set holds latents, and this run needs pictures; conditional_ddpm.vae and dit.vae take latents"
        )
    return batch["image"]


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> dict[str, Tensor]:
    """The posterior of pictures in [-1, 1], in the network's precision; the log-variance is clamped by diffusers."""
    posterior = vae.encode(images.to(vae.device, vae.dtype)).latent_dist
    return {"mean": posterior.mean, "logvar": posterior.logvar}


def decode(vae: AutoencoderKL, scaled: Tensor) -> Tensor:
    """The pixels of scaled latents."""
    latents = scaled / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    return vae.decode(latents.to(vae.dtype)).sample.float()
