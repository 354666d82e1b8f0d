"""Options of autoencoders, and the networks that they name: a folder, a JSON file, a name in configs/models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from trainers.base import BaseConfig, NonNegative, NonNegativeFloat, Positive, PositiveFloat, TrainerConfig
from trainers.common.model_files import Grid, Settings, load_pretrained, misfits, read_settings, settings_problems

if TYPE_CHECKING:
    from trainers.common.autoencoder.autoencoder import AutoencoderKL

ALLOWED = (
    "lpips (VGG16, downloaded by torchvision), lpips:FILE with torchvision's weights of vgg16, NAME:FILE with those of "
    "another torchvision network, such as resnet50:resnet50.pth, or ms_ssim, which needs no weights"
)
SSIM_WINDOW = 11  # pixels; a picture must be larger at every scale
LEVELS = 1  # resolution levels of an AutoencoderKL by default
ADVERSARIAL = (
    "adversarial_weight", "adversarial_start_step", "adaptive_weight", "discriminator_layers",
    "discriminator_channels", "r1_weight", "lecam_weight",
)  # fmt: skip


@dataclass(kw_only=True)
class VAEConfig(TrainerConfig):
    """Options of the section `vae`. The reconstruction loss is a mean over pixels, the KL a sum over latents."""

    # resuming compares the network itself
    free_on_resume: ClassVar[tuple[str, ...]] = (*TrainerConfig.free_on_resume, "model_config")
    training_only: ClassVar[tuple[str, ...]] = (
        "perceptual_loss", "perceptual_weight", "adversarial_loss", *ADVERSARIAL,
    )  # fmt: skip
    initial_weights: ClassVar[tuple[str, ...]] = (
        "pretrained_model_name_or_path", "subfolder", "revision", "decoder_only",
    )  # fmt: skip

    model_config: str | None = None  # folder, JSON file or name in configs/models; null: fits the resolution
    pretrained_model_name_or_path: str | None = None  # initial weights: folder or hub name; null: random
    subfolder: str | None = None  # of the pretrained model, such as vae; null: its top folder, or a local vae folder
    revision: str | None = None  # of the pretrained model on the hub; null: the latest
    decoder_only: bool = False  # train only the decoder, so that latents and scaling_factor stay the same
    reconstruction_loss: Literal["l1", "l2", "huber"] = "l1"  # mean over pixels in [-1, 1]
    huber_delta: PositiveFloat = 0.1  # error at which huber turns from quadratic to linear, in pixel values
    kl_weight: NonNegativeFloat = 1e-6  # weight of the KL in nats; for a loss summed over pixels it would be larger
    kl_warmup_steps: NonNegative = 0  # steps over which kl_weight rises from 0
    perceptual_loss: str | None = None  # lpips, lpips:FILE, NAME:FILE (torchvision) or ms_ssim; null: none
    perceptual_weight: PositiveFloat = 1.0  # weight of the perceptual distance
    adversarial_loss: Literal["hinge", "vanilla"] | None = None  # with a patch discriminator; null: none
    adversarial_weight: PositiveFloat = 0.5  # weight of the adversarial loss, multiplied by the adaptive weight
    adversarial_start_step: NonNegative = 10_000  # optimizer step at which the discriminator starts
    adaptive_weight: bool = True  # balance gradients at the decoder's last layer, per micro-batch
    discriminator_layers: Positive = 3  # its convolutions that halve the resolution
    discriminator_channels: Positive = 64  # output channels of its first layer
    r1_weight: NonNegativeFloat = 0.0  # R1: half of it times the squared gradient of real logits; 0: none
    lecam_weight: NonNegativeFloat = 0.0  # LeCam: keeps logits near moving averages; 0: none
    estimate_shift: bool = False  # also write a shift_factor, which Stable Diffusion 1 and 2 ignore

    def problems(self, base: BaseConfig) -> Iterator[tuple[str, str]]:
        yield from super().problems(base)
        yield from self._without_effect()
        if self.pretrained_model_name_or_path is None:
            yield from (("model_config", text) for text in autoencoder_problems(self.model_config, Grid.of(base)))
        elif self.model_config is not None:
            yield "model_config", "has no effect with pretrained_model_name_or_path; leave one of them null"
        if self.perceptual_loss is not None:
            found = perceptual_problem(self.perceptual_loss, base.channels, base.resolution)
            if found is not None:
                yield "perceptual_loss", found
        if self.adversarial_loss is not None:
            yield from self._adversarial_problems(base)

    def _without_effect(self) -> Iterator[tuple[str, str]]:
        pretrained = self.pretrained_model_name_or_path is not None
        for options, condition, holds in (
            (ADVERSARIAL, "adversarial_loss", self.adversarial_loss is not None),
            (("perceptual_weight",), "perceptual_loss", self.perceptual_loss is not None),
            (("huber_delta",), "reconstruction_loss: huber", self.reconstruction_loss == "huber"),
            (("kl_warmup_steps",), "kl_weight above 0", self.kl_weight > 0),
            (self.initial_weights[1:], "pretrained_model_name_or_path", pretrained),
            (("kl_weight", "kl_warmup_steps", "estimate_shift"), "a trained encoder", not self.decoder_only),
        ):
            yield from self.without_effect(options, condition, holds)

    def _adversarial_problems(self, base: BaseConfig) -> Iterator[tuple[str, str]]:
        least = smallest_picture(self.discriminator_layers)
        if base.resolution < least:
            yield "discriminator_layers", f"needs a base.resolution of at least {least}; take fewer layers"
        if base.compile and (self.adaptive_weight or self.r1_weight):
            found = "with adaptive_weight or r1_weight needs gradients within a step, which base.compile does not give"
            yield "adversarial_loss", f"{found}; switch one of them off"


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
    option: str, pretrained: str, grid: Grid, subfolder: str | None = None, trainable: bool = False, **options: Any
) -> AutoencoderKL:
    """Reads the network from a folder or the hub; a trainable one has our forward for training.

    `options` are a revision, a variant or a torch_dtype, which is float32 otherwise. Raises FileNotFoundError if
    nothing can be read, ValueError if it does not fit; messages name the `option`.
    """
    import diffusers

    from trainers.common.autoencoder.autoencoder import AutoencoderKL

    kind = AutoencoderKL if trainable else diffusers.AutoencoderKL
    options |= {"subfolder": find_subfolder(pretrained, subfolder), "low_cpu_mem_usage": False}
    return load_pretrained(kind, (option, pretrained), "vae", partial(misfits, grid=grid, levels=LEVELS), **options)
