"""Task `vae`: the autoencoder of latent diffusion, from scratch or fine-tuned, arXiv 1312.6114 and 2112.10752."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets_lib.errors import InputError
from trainers.base import MeasuresData, RandomSource
from trainers.common.autoencoder.latents import images_of
from trainers.common.autoencoder.options import VAEConfig, build_autoencoder, latent_grid, load_autoencoder
from trainers.common.diffusion.sampling import to_unit_range
from trainers.common.model_files import Grid
from trainers.pretrained import read_model

if TYPE_CHECKING:
    from torch import Tensor, nn

    from trainers.base import DataSet
    from trainers.common.autoencoder.autoencoder import AutoencoderKL, LatentStatistics


class VAETrainer(MeasuresData):
    """Trains an AutoencoderKL, together with a discriminator if the loss is adversarial."""

    Config = VAEConfig
    config: VAEConfig
    draws_held_out = True
    pipeline_tag = "image-to-image"  # reconstructs pictures
    hub_tags = ("autoencoder",)
    usage = (
        "import torch\n"
        "from diffusers import AutoencoderKL\n"
        'vae = AutoencoderKL.from_pretrained("{output_dir}")\n'
        "pictures = torch.zeros(1, vae.config.in_channels, 256, 256)  # yours, in [-1, 1]\n"
        "latents = vae.encode(pictures).latent_dist.sample() - (vae.config.shift_factor or 0.0)\n"
        "latents = latents * vae.config.scaling_factor"
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
            option, source = "vae.pretrained_model_name_or_path", config.pretrained_model_name_or_path
            vae = load_autoencoder(option, source, grid, config.subfolder, trainable=True, revision=config.revision)
        if config.decoder_only:
            self.statistics_samples = 0
            for network in filter(None, (vae.encoder, vae.quant_conv)):
                network.requires_grad_(False)
        self.latent_shape = latent_grid(vae.config, self.base.resolution).shape
        self.loss = AutoencoderLoss(config, self.base.resolution, self.device)
        if config.adversarial_loss is None:
            return {"vae": vae}
        start = config.adversarial_start_step
        if self.run.total_steps is not None and start >= self.run.total_steps:
            raise InputError(
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
            from trainers.common.autoencoder.adversarial import Reconstruction, adversarial_losses

            last_layer, averages = self.raw("vae").decoder.conv_out.weight, self.raw("discriminator").averages
            made = Reconstruction(images, reconstruction, reconstruction_loss, last_layer)
            adversarial, values = adversarial_losses(self.config, self.modules["discriminator"], averages, made, step)
            loss, terms = loss + adversarial, terms | values
        return loss, {name: term.detach() for name, term in terms.items()}

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

        return read_model(AutoencoderKL, output_dir)
