"""Task `ddpm`: an unconditional pixel-space diffusion model, arXiv 2006.11239."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainers.base import RandomSource
from trainers.common.diffusion.pixel_diffusion import PixelDiffusionConfig, PixelDiffusionTrainer

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True)
class DDPMConfig(PixelDiffusionConfig):
    """Options of the section `ddpm`."""


class DDPMTrainer(PixelDiffusionTrainer):
    """Trains a UNet2DModel; the result is a diffusers DDPMPipeline."""

    Config = DDPMConfig
    usage = (
        "from diffusers import DDPMPipeline\n"
        'pipeline = DDPMPipeline.from_pretrained("{output_dir}")\n'
        'pipeline(num_inference_steps={steps}).images[0].save("sample.png")'
    )

    def usage_of(self, location: str | Path) -> str:
        config, flow = self.config, self.config.objective == "rectified_flow"
        steps = config.ddpm_num_inference_steps if flow else config.ddpm_num_steps  # ancestral sampling needs all steps
        return self.usage.format(output_dir=location, steps=steps)

    def compute_loss(self, batch: dict[str, Any], rng: RandomSource, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self.objective.loss(self._predict, self.clean(batch, rng), rng).mean(), {}

    def validation_metrics(self, batch: dict[str, Any], rng: RandomSource) -> dict[str, Tensor]:
        return {"loss": self.objective.loss(self._predict, self.clean(batch, rng), rng)}

    def _predict(self, noisy: Tensor, timesteps: Tensor) -> Tensor:
        return self.modules["unet"](noisy, timesteps).sample

    def sample(self, requests: list[dict], rng: RandomSource) -> dict[str, Tensor]:
        return {"samples": self.draw(self._predict, rng)}

    def save_pipeline(self, output_dir: Path) -> None:
        from diffusers import DDPMPipeline

        DDPMPipeline(unet=self.raw("unet"), scheduler=self.scheduler).save_pretrained(output_dir)
