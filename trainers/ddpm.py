"""Task `ddpm`: an unconditional pixel-space diffusion model, arXiv 2006.11239."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from trainers.base import Positive, PositiveFloat, RandomSource, Section, Trainer, TrainerConfig
from trainers.common.objective import DDPMObjective
from trainers.common.sampling import denoise, initial_noise, to_unit_range
from trainers.common.unet2d import build_unet2d, unet2d_problems

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(kw_only=True)
class DDPMConfig(TrainerConfig):
    """Options of the section `ddpm`."""

    passive: ClassVar[tuple[str, ...]] = (
        *TrainerConfig.passive, "sampler", "ddpm_num_inference_steps",
        "model_config", "pretrained_model_name_or_path",  # the network itself is compared on resume
    )  # fmt: skip

    model_config: str | None = None  # folder, JSON file or name in configs/models; null: fits the resolution
    pretrained_model_name_or_path: str | None = (
        None  # initial weights: folder or hub name of a UNet2DModel; null: random
    )
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"  # what the network predicts
    snr_gamma: PositiveFloat | None = None  # min-SNR loss weights, 5 is usual; null: every timestep weighs 1
    ddpm_num_steps: Positive = 1000  # timesteps of the forward process
    ddpm_beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"  # its noise per timestep
    rescale_betas_zero_snr: bool = False  # last timestep is pure noise (arXiv 2305.08891); not with epsilon
    sampler: Literal["ddpm", "ddim"] = "ddpm"  # for the pictures at validations
    ddpm_num_inference_steps: Positive = 1000  # steps of the sampler

    def problems(self, base: Section) -> Iterator[tuple[str, str]]:
        yield from super().problems(base)
        if self.pretrained_model_name_or_path is None:
            yield from (("model_config", problem) for problem in unet2d_problems(self.model_config, base))
        elif self.model_config is not None:
            yield "model_config", "has no effect with pretrained_model_name_or_path; leave one of them null"
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            yield "rescale_betas_zero_snr", "needs prediction_type: v_prediction or sample; noise says nothing at SNR 0"
        if self.ddpm_num_inference_steps > self.ddpm_num_steps:
            yield "ddpm_num_inference_steps", f"must be at most ddpm_num_steps = {self.ddpm_num_steps}"


class DDPMTrainer(Trainer):
    """Trains a UNet2DModel; the result is a diffusers DDPMPipeline."""

    Config = DDPMConfig
    usage = (
        "from diffusers import DDPMPipeline\n"
        'pipeline = DDPMPipeline.from_pretrained("{output_dir}")\n'
        'pipeline(num_inference_steps={ddpm_num_steps}).images[0].save("sample.png")'
    )

    def init_modules(self) -> dict[str, nn.Module]:
        from diffusers import DDPMScheduler

        config = self.config
        self.scheduler = DDPMScheduler(
            num_train_timesteps=config.ddpm_num_steps,
            beta_schedule=config.ddpm_beta_schedule,
            prediction_type=config.prediction_type,
            rescale_betas_zero_snr=config.rescale_betas_zero_snr,
            timestep_spacing="trailing" if config.rescale_betas_zero_snr else "leading",
        )
        self.objective = DDPMObjective(self.scheduler, config.snr_gamma)
        return {"unet": build_unet2d(config.model_config, config.pretrained_model_name_or_path, self.base)}

    def compute_loss(self, batch: dict[str, Any], rng: RandomSource, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self.objective.loss(self._predict, batch["image"], rng).mean(), {}

    def validation_metrics(self, batch: dict[str, Any], rng: RandomSource) -> dict[str, Tensor]:
        return {"loss": self.objective.loss(self._predict, batch["image"], rng)}

    def _predict(self, noisy: Tensor, timesteps: Tensor) -> Tensor:
        return self.modules["unet"](noisy, timesteps).sample

    def sample(self, requests: list[dict], rng: RandomSource) -> dict[str, Tensor]:
        from diffusers import DDIMScheduler

        generators = rng.generators()
        size = self.base.resolution
        noise = initial_noise((self.base.channels, size, size), generators, self.device)
        scheduler = self.scheduler
        if self.config.sampler == "ddim":
            scheduler = DDIMScheduler.from_config(self.scheduler.config)
        steps = self.config.ddpm_num_inference_steps
        drawn = denoise(self._predict, scheduler, noise, steps, generators, self.progress)
        return {"samples": to_unit_range(drawn)}

    def save_pipeline(self, output_dir: Path) -> None:
        from diffusers import DDPMPipeline

        DDPMPipeline(unet=self.raw("unet"), scheduler=self.scheduler).save_pretrained(output_dir)
