"""Base class of diffusion tasks on pixels or latents: a network, a noise schedule, an objective and a sampler."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from trainers.base import BaseConfig, Positive, PositiveFloat, RandomSource, Trainer, TrainerConfig
from trainers.common.autoencoder.latents import LatentSpace, images_of
from trainers.common.diffusion.objective import DDPMObjective, ObjectiveOptions, Predict, RectifiedFlow
from trainers.common.diffusion.sampling import build_sampler, denoise, initial_noise, to_unit_range
from trainers.common.model_files import Grid
from trainers.common.unet2d import build_unet2d, unet2d_problems

if TYPE_CHECKING:
    from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
    from torch import Tensor, nn


@dataclass(kw_only=True)
class NoisyPixelsConfig(TrainerConfig):
    """Options of a network on noisy pixels: its shape and the noise schedule."""

    free_on_resume: ClassVar[tuple[str, ...]] = (  # resuming compares the network itself
        *TrainerConfig.free_on_resume, "model_config", "pretrained_model_name_or_path",
    )  # fmt: skip

    fixed_by_task: ClassVar[tuple[str, ...]] = ()  # settings of the network that the task decides, such as out_channels

    model_config: str | None = None  # folder, JSON file or name in configs/models; null: fits the resolution
    pretrained_model_name_or_path: str | None = None  # initial weights: folder or hub name; null: random
    ddpm_num_steps: Positive = 1000  # timesteps of the forward process
    ddpm_beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"  # its noise per timestep
    rescale_betas_zero_snr: bool = False  # make the last timestep pure noise (arXiv 2305.08891); not with epsilon

    def problems(self, base: BaseConfig) -> Iterator[tuple[str, str]]:
        yield from super().problems(base)
        if self.pretrained_model_name_or_path is None:
            grid = self.seen(base)
            found = self.network_problems(grid) if grid else ()
            yield from (("model_config", problem) for problem in found)
        elif self.model_config is not None:
            yield "model_config", "has no effect with pretrained_model_name_or_path; leave one of them null"

    def seen(self, base: BaseConfig) -> Grid | None:
        """The network's input; None if it is not known yet."""
        return Grid.of(base)

    def network_problems(self, grid: Grid) -> Iterator[str]:
        """Yields why the network of model_config cannot work on the grid."""
        return unet2d_problems(self.model_config, grid, self.fixed_by_task)


def build_schedule(config: NoisyPixelsConfig, **settings: Any) -> DDPMScheduler:
    """Builds the noise schedule of a config; `settings` are further arguments of the scheduler."""
    from diffusers import DDPMScheduler

    return DDPMScheduler(
        num_train_timesteps=config.ddpm_num_steps,
        beta_schedule=config.ddpm_beta_schedule,
        rescale_betas_zero_snr=config.rescale_betas_zero_snr,
        timestep_spacing="trailing" if config.rescale_betas_zero_snr else "leading",
        **settings,
    )


@dataclass(kw_only=True)
class PixelDiffusionConfig(ObjectiveOptions, NoisyPixelsConfig):
    """Options of the objective and the sampler."""

    free_on_resume: ClassVar[tuple[str, ...]] = (
        *NoisyPixelsConfig.free_on_resume, "sampler", "ddpm_num_inference_steps",
    )  # fmt: skip

    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"  # what the network predicts
    snr_gamma: PositiveFloat | None = None  # min-SNR loss weights, 5 is usual; null: every timestep weighs 1
    sampler: Literal["ddpm", "ddim", "dpmsolver++", "euler"] | None = None  # null: ddpm, or euler of a flow
    ddpm_num_inference_steps: Positive = 1000  # steps of the sampler

    def problems(self, base: BaseConfig) -> Iterator[tuple[str, str]]:
        yield from super().problems(base)
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            yield "rescale_betas_zero_snr", "needs prediction_type: v_prediction or sample; noise says nothing at SNR 0"
        of_diffusion = ("prediction_type", "snr_gamma", "ddpm_beta_schedule", "rescale_betas_zero_snr")
        yield from self.objective_problems(of_diffusion)
        allowed = ("euler", "dpmsolver++") if self.is_flow else ("ddpm", "ddim", "dpmsolver++")
        if self.sampler not in (None, *allowed):
            yield "sampler", f"must be {', '.join(allowed)} or null with objective: {self.objective}"
        if self.ddpm_num_inference_steps > self.ddpm_num_steps:
            yield "ddpm_num_inference_steps", f"must be at most ddpm_num_steps = {self.ddpm_num_steps}"

    @property
    def chosen_sampler(self) -> str:
        """The sampler's name; of null, the objective's default."""
        return self.sampler or ("euler" if self.is_flow else "ddpm")


class PixelDiffusionTrainer(Trainer):
    """Trains a network, by default an unconditional UNet2DModel, on pixels or on an autoencoder's latents."""

    config: PixelDiffusionConfig
    network_name: ClassVar[str] = "unet"  # its folder in diffusers' pipelines
    latents: LatentSpace | None = None  # in place of pixels; set before setup()
    scheduler: DDPMScheduler | FlowMatchEulerDiscreteScheduler
    objective: DDPMObjective | RectifiedFlow

    def setup(self) -> None:
        from trainers.common.class_pipeline import noise_levels

        config = self.config
        self.grid = Grid.of(self.base) if self.latents is None else self.latents.grid
        if config.is_flow:
            self.objective = config.build_flow(config.ddpm_num_steps)
        else:
            clip_sample = self.latents is None  # latents have no bounds
            scheduler = build_schedule(config, prediction_type=config.prediction_type, clip_sample=clip_sample)
            self.objective = DDPMObjective(scheduler, config.snr_gamma)
        self.scheduler = self.objective.scheduler
        self.sigma_of = noise_levels(self.scheduler)

    def init_modules(self) -> dict[str, nn.Module]:
        return {self.network_name: self.build_network(self.grid)}

    def compute_loss(self, batch: dict[str, Any], rng: RandomSource, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self._losses(batch, rng).mean(), {}

    def validation_metrics(self, batch: dict[str, Any], rng: RandomSource) -> dict[str, Tensor]:
        return {"loss": self._losses(batch, rng)}

    def _losses(self, batch: dict[str, Any], rng: RandomSource) -> Tensor:
        return self.objective.loss(self.predictor(batch, rng), self.clean(batch, rng), rng)

    def predictor(self, batch: dict[str, Any], rng: RandomSource) -> Predict:
        """Returns the network as the objective calls it on a batch."""
        return self.predict

    def predict(self, noisy: Tensor, timesteps: Tensor) -> Tensor:
        return self.modules[self.network_name](noisy, timesteps).sample

    def clean(self, batch: dict[str, Any], rng: RandomSource) -> Tensor:
        """Returns the clean pictures or latents [B, c, h, w], to which noise is added."""
        import torch

        if self.latents is None:
            return images_of(batch)
        latents = self.latents.draw(batch, rng)
        if "image_key" in batch and self.device.type == "cpu":  # cached: restore the encoder's memory layout, because
            latents = latents.to(memory_format=torch.channels_last)  # sums differ in their last bits with another one
        return latents

    def build_network(self, grid: Grid) -> nn.Module:
        """Builds the network for a grid, in float32."""
        config, settings = self.config, self.network_settings()
        return build_unet2d(config.model_config, config.pretrained_model_name_or_path, grid, settings)

    def network_settings(self) -> dict[str, Any]:
        """Settings of the UNet2DModel that the task decides; they override the file."""
        return {}

    def draw(self, predict: Predict, rng: RandomSource) -> Tensor:
        """Draws pictures [B, C, H, W] in [0, 1] with the network's `predict(noisy, timestep)`."""
        frames, generators, steps = self.frames, rng.generators(), self.config.ddpm_num_inference_steps
        noise = initial_noise(self.grid.shape, generators, self.device)
        scheduler = build_sampler(self.config.chosen_sampler, self.scheduler)
        after_step = None if frames is None else lambda sample: frames.append(self._as_pictures(sample).cpu())
        return self._as_pictures(denoise(predict, scheduler, noise, steps, generators, self.progress, after_step))

    def _as_pictures(self, sample: Tensor) -> Tensor:
        if self.latents is None:
            return to_unit_range(sample)
        pictures = to_unit_range(self.latents.decode(sample))
        self.latents.offload()
        return pictures
