"""Task `vae`: the autoencoder of latent diffusion, from scratch or fine-tuned, arXiv 1312.6114 and 2112.10752."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from trainers.base import (
    BaseConfig,
    MeasuresData,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    RandomSource,
    TrainerConfig,
)
from trainers.common.autoencoder.latents import images_of
from trainers.common.autoencoder.options import (
    autoencoder_problems,
    build_autoencoder,
    latent_grid,
    load_autoencoder,
    perceptual_problem,
    smallest_picture,
)
from trainers.common.diffusion.sampling import to_unit_range
from trainers.common.model_files import Grid

if TYPE_CHECKING:
    from torch import Tensor, nn

    from trainers.base import DataSet
    from trainers.common.autoencoder.autoencoder import AutoencoderKL, LatentStatistics
    from trainers.common.autoencoder.discriminator import PatchDiscriminator

ADVERSARIAL = (
    "adversarial_weight", "adversarial_start_step", "adaptive_weight", "discriminator_layers",
    "discriminator_channels", "r1_weight", "lecam_weight",
)  # fmt: skip


@dataclass(kw_only=True)
class VAEConfig(TrainerConfig):
    """Options of the section `vae`. The reconstruction loss is a mean over pixels, the KL a sum over latents."""

    free_on_resume: ClassVar[tuple[str, ...]] = (  # resuming compares the network itself
        *TrainerConfig.free_on_resume, "model_config",
    )  # fmt: skip
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
        """Yields options that another option switches off."""
        pretrained = self.pretrained_model_name_or_path is not None
        for options, condition, holds in (
            (ADVERSARIAL, "adversarial_loss", self.adversarial_loss is not None),
            (("perceptual_weight",), "perceptual_loss", self.perceptual_loss is not None),
            (("huber_delta",), "reconstruction_loss: huber", self.reconstruction_loss == "huber"),
            (("kl_warmup_steps",), "kl_weight above 0", self.kl_weight > 0),
            (self.initial_weights[1:], "pretrained_model_name_or_path", pretrained),
        ):
            yield from self.without_effect(options, condition, holds)
        for option in ("kl_weight", "kl_warmup_steps", "estimate_shift"):
            if self.decoder_only and getattr(self, option) != type(self).__dataclass_fields__[option].default:
                yield option, "has no effect with decoder_only: the encoder stays as it is"

    def _adversarial_problems(self, base: BaseConfig) -> Iterator[tuple[str, str]]:
        least = smallest_picture(self.discriminator_layers)
        if base.resolution < least:
            yield "discriminator_layers", f"needs a base.resolution of at least {least}; take fewer layers"
        if base.compile and (self.adaptive_weight or self.r1_weight):
            found = "with adaptive_weight or r1_weight needs gradients within a step, which base.compile does not give"
            yield "adversarial_loss", f"{found}; switch one of them off"


class VAETrainer(MeasuresData):
    """Trains an AutoencoderKL, together with a discriminator if the loss is adversarial."""

    Config = VAEConfig
    config: VAEConfig
    draws_held_out = True
    usage = (
        "from diffusers import AutoencoderKL\n"
        'vae = AutoencoderKL.from_pretrained("{output_dir}")\n'
        "latents = vae.encode(pictures).latent_dist.sample() * vae.config.scaling_factor  # pictures in [-1, 1]"
    )
    statistics_samples: int = 10_000  # examples over which the scaling factor is estimated
    latent_statistics: LatentStatistics | None = None  # of the latest validation

    def setup(self) -> None:
        self.statistics: dict[str, float] = {}

    def init_modules(self) -> dict[str, nn.Module]:
        from trainers.common.autoencoder.discriminator import PatchDiscriminator
        from trainers.common.autoencoder.loss import AutoencoderLoss

        config, grid = self.config, Grid.of(self.base)
        if config.pretrained_model_name_or_path is None:
            vae = build_autoencoder(config.model_config, grid)
            if self.run.total_steps is not None:
                vae.register_to_config(scaling_factor=None, shift_factor=None)  # unknown until measured
        else:
            place = config.pretrained_model_name_or_path, grid, config.subfolder, config.revision
            vae = load_autoencoder("vae.pretrained_model_name_or_path", *place, trainable=True)
        if config.decoder_only:
            self.statistics_samples = 0
            for network in filter(None, (vae.encoder, vae.quant_conv)):
                network.requires_grad_(False)
        latents = latent_grid(vae.config, self.base.resolution)
        self.latent_shape = (latents.channels, latents.resolution, latents.resolution)
        self.loss = AutoencoderLoss(config, self.base.resolution, self.device)
        if config.adversarial_loss is None:
            return {"vae": vae}
        start = config.adversarial_start_step
        if self.run.total_steps is not None and start >= self.run.total_steps:
            raise ValueError(
                f"vae.adversarial_start_step = {start}: must be below the run's {self.run.total_steps} steps"
            )
        shape = self.base.channels, config.discriminator_layers, config.discriminator_channels
        return {"vae": vae, "discriminator": PatchDiscriminator(*shape)}

    def compute_loss(self, batch: dict[str, Any], rng: RandomSource, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        images = images_of(batch)
        reconstruction, moments = self.modules["vae"](images, rng.normal("posterior", self.latent_shape))
        terms = {name: rows.mean() for name, rows in self.loss.distances(images, reconstruction).items()}
        reconstruction_loss = self.loss.weighted(terms)
        terms["kl"] = self.loss.kl(moments).mean()
        loss = reconstruction_loss + self.loss.kl_weight(step) * terms["kl"]
        if self.config.adversarial_loss is not None and step >= self.config.adversarial_start_step:
            adversarial, values = self._adversarial(images, reconstruction, reconstruction_loss, step)
            loss, terms = loss + adversarial, terms | values
        return loss, {name: term.detach() for name, term in terms.items()}

    def _adversarial(
        self, images: Tensor, reconstruction: Tensor, reconstruction_loss: Tensor, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        from trainers.common.autoencoder.adversarial import Reconstruction, adversarial_losses

        vae: AutoencoderKL = self.raw("vae")
        discriminator: PatchDiscriminator = self.raw("discriminator")
        made = Reconstruction(images, reconstruction, reconstruction_loss, vae.decoder.conv_out.weight)
        return adversarial_losses(self.config, self.modules["discriminator"], discriminator.averages, made, step)

    def validation_metrics(self, batch: dict[str, Any], rng: RandomSource) -> dict[str, Tensor]:
        """Returns the non-adversarial loss, its terms, PSNR (dB) and SSIM, all for the posterior's mode."""
        from trainers.common.autoencoder.autoencoder import latent_moments
        from trainers.common.autoencoder.loss import quality

        images = batch["image"]
        reconstruction, moments = self.modules["vae"](images)
        metrics = self.loss.distances(images, reconstruction)
        kl = self.loss.kl(moments)
        loss = self.loss.weighted(metrics) + self.loss.kl_weight(self.config.kl_warmup_steps) * kl
        return {"loss": loss} | metrics | {"kl": kl} | quality(images, reconstruction) | latent_moments(moments)

    def validation_summary(self, means: dict[str, float]) -> dict[str, float]:
        """Replaces the latents' mean squares by standard deviations, per channel and overall."""
        from trainers.common.autoencoder.autoencoder import LatentStatistics

        self.latent_statistics = LatentStatistics(means)
        kept = {name: value for name, value in means.items() if not name.startswith("latent_square/")}
        return kept | self.latent_statistics.as_metrics()

    def sample_requests(self, validation_set: DataSet | None) -> list[dict]:
        """Requests evenly spread held-out pictures, or else random latents if their distribution is known."""
        if validation_set is None:
            known = self._latent_distribution() is not None
            return [{} for _ in range(self.config.valid_batch_size if known else 0)]
        return self.held_out_requests(validation_set, self.config.valid_batch_size)

    def evaluation_requests(self, count: int, validation_set: DataSet | None = None) -> list[dict]:
        return self.held_out_requests(validation_set, count)

    def sample(self, requests: list[dict], rng: RandomSource) -> dict[str, Tensor]:
        """Draws strips "original | reconstruction | difference" [N, C, H, 3W], and decodes random latents."""
        import torch

        drawn = {}
        if "image" in requests[0]:
            images = self.stacked(requests, "image")
            originals, reconstructions = to_unit_range(images), to_unit_range(self.modules["vae"](images)[0].float())
            if "evaluation" in requests[0]:
                return {"samples": reconstructions}
            differences = (0.5 + reconstructions - originals).clamp(0, 1)  # grey: no difference
            drawn["reconstructions"] = torch.cat([originals, reconstructions, differences], dim=3)
        distribution = self._latent_distribution()
        if distribution is not None:
            latents = distribution[0] + distribution[1] * rng.normal("latent", self.latent_shape)
            drawn["random_latents"] = to_unit_range(self.modules["vae"](latents=latents)[0].float())
        return drawn

    def _latent_distribution(self) -> tuple[Tensor, Tensor] | None:
        """Mean and standard deviation [c, 1, 1] of the latest validation, or else from the network's config."""
        import torch

        vae: AutoencoderKL = self.raw("vae")
        config, statistics = vae.config, self.latent_statistics
        if statistics is None and config.scaling_factor is None:
            return None
        if statistics is None:
            mean, std = torch.tensor(config.shift_factor or 0.0), torch.tensor(1 / config.scaling_factor)
        else:
            mean, std = statistics.mean, statistics.std
        mean, std = (values.to(self.device, torch.float32).reshape(-1, 1, 1) for values in (mean, std))
        return mean, std

    def data_statistics(self, batch: dict[str, Any], rng: RandomSource) -> dict[str, Tensor]:
        """Returns the latent moments from which the scaling factor is estimated."""
        from trainers.common.autoencoder.autoencoder import latent_moments

        return latent_moments(self.modules["vae"](batch["image"], decode=False)[1])

    def save_pipeline(self, output_dir: Path) -> None:
        from trainers.common.autoencoder.autoencoder import LatentStatistics

        vae: AutoencoderKL = self.raw("vae")
        if self.statistics:
            found = LatentStatistics(self.statistics)
            shift = found.total_mean if self.config.estimate_shift else None
            scale = 1 / max(found.total_std, 1e-8)  # in case the encoder has become constant
            vae.register_to_config(scaling_factor=scale, shift_factor=shift)
        vae.save_pretrained(output_dir)

    @classmethod
    def load_pipeline(cls, output_dir: str | Path) -> Any:
        from diffusers import AutoencoderKL

        return AutoencoderKL.from_pretrained(output_dir)
