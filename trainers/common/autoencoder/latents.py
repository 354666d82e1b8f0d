"""Latents of a frozen autoencoder: encoding, sampling, scaling and decoding."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets_lib.errors import InputError
from datasets_lib.file_hashes import FileHashes, cache_directory
from trainers.base import BaseConfig, CacheKind, Encoder, RandomSource
from trainers.common.autoencoder.options import find_subfolder, latent_grid, load_autoencoder
from trainers.common.model_files import Grid, files_digest
from trainers.model_configs import read_config
from trainers.pretrained import reading
from trainers.single_file.configs import network_config
from trainers.single_file.header import is_single_file
from trainers.single_file.part_files import write_part
from trainers.single_file.recognition import open_autoencoder
from trainers.weight_files import copy_part

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL
    from torch import Tensor

UNSAID = ("scaling_factor", "shift_factor", "force_upcast")  # by an autoencoder's tensors
HUB_FILES = (
    "config.json", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model-*-of-*.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
)  # fmt: skip


def vae_config(source: str) -> dict[str, Any] | None:
    """Reads the config of an autoencoder in a local folder or file; None if there is none, as for a hub name."""
    if is_single_file(source):
        return network_config(open_autoencoder(Path(source), source), "vae")
    path = Path(source) / (find_subfolder(source, None) or "") / "config.json"
    return read_config(path) if path.is_file() else None


def latents_problems(source: str, has_base: bool = False) -> Iterator[str]:
    """Yields problems of an option that names an autoencoder, as far as a local folder or file shows them.

    With a base model, whose latents are scaled in one way, a file need not say how.
    """
    try:
        settings = vae_config(source)
    except (OSError, ValueError) as error:
        yield str(error)
        return
    if settings is None and Path(source).exists():
        yield "must be a finished vae run: a folder with config.json or vae/config.json"
    unknown = settings is not None and settings.get("scaling_factor", 1) is None
    if unknown and is_single_file(source):
        if not has_base:
            yield "is an autoencoder alone, which does not say its scaling_factor; give a folder with config.json"
    elif unknown:
        yield "its scaling_factor is not known yet: give the finished run, not one of its checkpoints"


def cache_problems(caches: Mapping[str, CacheKind | None], base: BaseConfig) -> Iterator[tuple[str, str]]:
    """Yields (option, problem) for caches whose entries would differ from one epoch to the next."""
    if caches["cache_latents"] is not None and not base.center_crop:
        yield "cache_latents", "keeps one crop of each picture: set base.center_crop: true"
    for option, cache in caches.items():
        if base.streaming and cache is not None:
            reason = "keeps what is known before the first step, and with base.streaming nothing is; set it to null"
            yield option, reason


@dataclass
class LatentSpace:
    """Scaled latents z = (x - shift) * scale of an AutoencoderKL, with shift and scale of its config.

    Raises ValueError if the data was encoded by another network, whose digest is `encoded_by`.
    """

    option: str  # which locates the autoencoder, for messages
    source: str  # its value
    base: BaseConfig
    device: torch.device
    dtype: torch.dtype
    encoded_by: str | None = None
    variant: str | None = None
    offloaded: bool = False  # whether the autoencoder leaves the device when it is not in use
    base_settings: Mapping[str, Any] | None = None  # of the base model's, for a file that does not say its scale

    def __post_init__(self) -> None:
        option, base = self.option, self.base
        self.pictures = Grid.of(base)
        self.settings = vae_config(self.source) or self._settings_on_hub()
        self.unsaid = self._unsaid() if self.settings.get("scaling_factor", 1) is None else {}
        self.settings |= self.unsaid
        self.grid = latent_grid(self.settings, base.resolution)
        if self.settings.get("scaling_factor", 1) is None:
            raise InputError(
                f"{option} = {self.source}: its autoencoder's scaling_factor is null; write it in its config"
            )
        if base.buckets and base.bucket_step % self.factor:
            factor = f"must be a multiple of {self.factor}, the pixels per latent of {option}"
            raise InputError(f"base.bucket_step = {base.bucket_step}: {factor}")
        if self.encoded_by is not None and self.encoded_by != self.digest:
            found = "the data set was encoded by another network; encode it with this one"
            raise InputError(f"{option} = {self.source}: {found}")

    def _settings_on_hub(self) -> dict[str, Any]:
        """The config as written in the file, without defaults."""
        from diffusers import AutoencoderKL

        try:
            return AutoencoderKL.load_config(self.source)
        except OSError:
            return dict(self.load().config)  # or an error that explains

    def _unsaid(self) -> dict[str, Any]:
        """Returns the scale of latents, which an autoencoder alone in a file does not say: the base model's."""
        if self.base_settings is None or not is_single_file(self.source):
            return {}
        return {"scaling_factor": 0.18215} | {n: self.base_settings[n] for n in UNSAID if n in self.base_settings}

    @cached_property
    def vae(self) -> AutoencoderKL:
        """The frozen autoencoder on the device; in float32 if its config says that half precision overflows."""
        vae = self.load(self.vae_dtype)  # cast later, diffusers would warn
        return vae.to(self.device).eval().requires_grad_(False)

    @property
    def vae_dtype(self) -> torch.dtype:
        """Read from the file, because diffusers' default for force_upcast is True."""
        import torch

        return torch.float32 if self.settings.get("force_upcast") else self.dtype

    def load(self, dtype: torch.dtype | None = None) -> AutoencoderKL:
        """Loads a copy on the CPU, in float32 if no dtype is given."""
        import torch

        options: dict[str, Any] = {"variant": self.variant, "torch_dtype": dtype or torch.float32}
        found = load_autoencoder(self.option, self.source, self.pictures, **options)
        found.register_to_config(**self.unsaid)
        return found

    def copy_to(self, folder: Path, kept: str | None = None) -> None:
        """Copies the autoencoder's files as they are, and those of the variant `kept` if there are any."""
        from diffusers import AutoencoderKL
        from huggingface_hub import snapshot_download

        if is_single_file(self.source):
            place = f"{self.option} = {self.source}"
            return write_part(folder, open_autoencoder(Path(self.source), place), "vae", settings=self.unsaid)
        source = Path(self.source) / (find_subfolder(self.source, None) or "")
        if not source.is_dir():
            with reading(AutoencoderKL, self.source, f"{self.option} = {self.source}"):
                source = Path(snapshot_download(self.source, allow_patterns=[*HUB_FILES]))  # they are there already
        copy_part(source, folder, self.variant, kept)

    @cached_property
    def digest(self) -> str:
        """Hash of the autoencoder's weights: 16 hex digits."""
        content = hashlib.sha256()
        for name, weights in sorted(self.load().state_dict().items()):
            content.update(name.encode() + weights.numpy().tobytes())
        return content.hexdigest()[:16]

    def encoder(self, cache: CacheKind | None = None, column: str = "") -> Encoder:
        """Makes the encoder from `<column>image` to the posterior: `<column>mean` and `<column>logvar`."""

        def write(vae: AutoencoderKL, images: Tensor) -> dict[str, Tensor]:
            return {f"{column}{name}": rows for name, rows in encode(vae, images).items()}

        def source() -> dict[str, Any]:
            folder = Path(self.source) / (find_subfolder(self.source, None) or "")
            hashes = FileHashes(cache_directory(self.base))
            digest = files_digest(folder, hash_of=hashes.sha256) if folder.is_dir() else self.digest
            return {"vae": digest, "variant": self.variant, "dtype": str(self.vae_dtype)}

        writes = (f"{column}mean", f"{column}logvar")
        optional = column != ""  # such as class images, which only training examples have
        sizes = (None, None) if self.base.buckets else self.grid.shape[1:]
        found = Encoder(f"{column}image", writes, lambda: self.vae, write, source, cache, optional=optional)
        found.shapes, found.dtype = dict.fromkeys(writes, (self.grid.channels, *sizes)), self.vae_dtype
        return found

    def draw(self, batch: dict[str, Any], rng: RandomSource, column: str = "") -> Tensor:
        """Samples scaled latents [B, c, h, w] from the posteriors in `<column>mean` and `<column>logvar`."""
        mean, logvar = batch[f"{column}mean"].float(), batch[f"{column}logvar"].float()
        return self.scaled(mean + (logvar / 2).exp() * rng.normal(f"{column}latent", mean.shape[1:]))

    def offload(self) -> None:
        """Moves the autoencoder off the device if only validations need it."""
        if self.offloaded:
            self.vae.to("cpu")

    @property
    def factor(self) -> int:
        """Pixels per latent along a side."""
        return self.pictures.resolution // self.grid.resolution

    def scaled(self, latents: Tensor) -> Tensor:
        return (latents - (self.settings.get("shift_factor") or 0.0)) * self.settings.get("scaling_factor", 0.18215)

    def decode(self, scaled: Tensor) -> Tensor:
        """Decodes to pixels [B, C, H, W] in [-1, 1], not clamped; without gradients."""
        import torch

        with torch.no_grad():
            return decode(self.vae.to(self.device), scaled)


def images_of(batch: dict[str, Any]) -> Tensor:
    """Returns the pictures [B, C, H, W] of a batch; ValueError if it holds latents."""
    if "image" not in batch:
        raise InputError(
            "the data set holds latents, and this run needs pictures; conditional_ddpm.vae and dit.vae take latents"
        )
    return batch["image"]


def encode(vae: AutoencoderKL, images: Tensor) -> dict[str, Tensor]:
    """Encodes pictures in [-1, 1] to the posterior, in the network's precision, without gradients.

    diffusers clamps the log-variance.
    """
    import torch

    with torch.no_grad():
        posterior = vae.encode(images.to(vae.device, vae.dtype)).latent_dist
    return {"mean": posterior.mean, "logvar": posterior.logvar}


def decode(vae: AutoencoderKL, scaled: Tensor) -> Tensor:
    """Decodes scaled latents to float32 pixels."""
    latents = scaled / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    return vae.decode(latents.to(vae.dtype)).sample.float()
