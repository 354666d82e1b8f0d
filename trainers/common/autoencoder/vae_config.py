"""Options of the autoencoder of latent diffusion and of its losses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from trainers.base import BaseConfig, NonNegative, NonNegativeFloat, Positive, PositiveFloat, TrainerConfig
from trainers.common.autoencoder.options import autoencoder_problems, perceptual_problem, smallest_picture
from trainers.common.model_files import Grid

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
