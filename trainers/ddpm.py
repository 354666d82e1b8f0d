"""Task `ddpm`: an unconditional pixel-space diffusion model, arXiv 2006.11239."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from datasets_lib.foreign import in_quotes
from trainers.base import RandomSource
from trainers.common.diffusion.pixel_diffusion import PixelDiffusionConfig, PixelDiffusionTrainer

if TYPE_CHECKING:
    from torch import Tensor


class DDPMTrainer(PixelDiffusionTrainer):
    """Trains a UNet2DModel; the result is a diffusers DDPMPipeline."""

    Config = PixelDiffusionConfig
    pipeline_tag = "unconditional-image-generation"
    usage = (
        "from diffusers import DDPMPipeline\n"
        'pipeline = DDPMPipeline.from_pretrained("{output_dir}")\n'
        'pipeline(num_inference_steps={steps}).images[0].save("sample.png")'
    )

    def usage_of(self, location: str | Path) -> str:
        config = self.config  # ancestral sampling needs all steps
        steps = config.ddpm_num_inference_steps if config.is_flow else config.ddpm_num_steps
        return self.usage.format(output_dir=in_quotes(location), steps=steps)

    def sample(self, requests: list[dict], rng: RandomSource) -> dict[str, Tensor]:
        return {"samples": self.draw(self.predict, rng)}

    def save_pipeline(self, output_dir: Path) -> None:
        from diffusers import DDPMPipeline

        DDPMPipeline(unet=self.raw("unet"), scheduler=self.scheduler).save_pretrained(output_dir)
