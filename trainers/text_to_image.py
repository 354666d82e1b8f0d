"""Task `text_to_image`: a Stable Diffusion pipeline's whole UNet, fine-tuned or from scratch, arXiv 2112.10752."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from trainers.base import BaseConfig, PositiveFloat
from trainers.common.text_to_image.objective import Learned, build_flow
from trainers.common.text_to_image.options import StableDiffusionConfig
from trainers.common.text_to_image.stable_diffusion import StableDiffusionTrainer
from trainers.common.text_to_image.unet2d_condition import build_unet, unet_problems

if TYPE_CHECKING:
    from torch import nn

OF_DIFFUSION = (
    "prediction_type", "snr_gamma", "loss_type", "noise_offset", "input_perturbation", "rescale_betas_zero_snr",
    "dream_detail_preservation", "timestep_range", "timestep_bias_strategy",
)  # fmt: skip


@dataclass(kw_only=True)
class TextToImageConfig(StableDiffusionConfig):
    """Options of the section `text_to_image`."""

    free_on_resume: ClassVar[tuple[str, ...]] = (*StableDiffusionConfig.free_on_resume, "model_config")
    initial_weights: ClassVar[tuple[str, ...]] = ()  # the base model's other parts are needed as well
    export_is_base_model: ClassVar[bool] = True

    learning_rate: PositiveFloat | dict[str, float] = 1e-5  # peak of the schedule
    model_config: str | None = None  # UNet from scratch: folder, JSON file or name in configs/models; null: the base's
    objective: Literal["ddpm", "rectified_flow"] = "ddpm"  # training objective; a flow predicts noise minus picture
    time_distribution: Literal["uniform", "logit_normal"] = "uniform"  # of a flow's training times
    time_logit_mean: float = 0.0  # of logit_normal; below 0: closer to pictures than to noise
    time_logit_std: PositiveFloat = 1.0  # of logit_normal
    time_shift: PositiveFloat = 1.0  # shifts a flow's times towards noise, in sampling too; 3 is usual at 1024 pixels

    def problems(self, base: BaseConfig) -> Iterator[tuple[str, str]]:
        yield from super().problems(base)
        flow, logit_normal = self.objective == "rectified_flow", self.time_distribution == "logit_normal"
        yield from self.without_effect(OF_DIFFUSION, "objective: ddpm", not flow)
        yield from self.without_effect(("time_distribution", "time_shift"), "objective: rectified_flow", flow)
        of_logit = ("time_logit_mean", "time_logit_std")
        yield from self.without_effect(of_logit, "time_distribution: logit_normal", logit_normal)
        if flow and self.sampler not in (None, "euler", "dpmsolver++"):
            yield "sampler", "must be euler, dpmsolver++ or null with objective: rectified_flow"
        if self.model_config is not None:
            yield from (("model_config", problem) for problem in unet_problems(self.model_config))

    def parts_needed(self) -> tuple[str, ...]:
        return tuple(part for part in super().parts_needed() if part != "unet" or self.model_config is None)


class TextToImageTrainer(StableDiffusionTrainer):
    """Trains the whole UNet; the result is a complete pipeline."""

    Config = TextToImageConfig
    config: TextToImageConfig
    task = "text_to_image"
    usage = (
        "from diffusers import DiffusionPipeline\n"
        'pipeline = DiffusionPipeline.from_pretrained("{output_dir}")\n'
        'pipeline("a prompt").images[0].save("sample.png")'
    )

    def build_objective(self) -> Learned:
        if self.config.objective == "ddpm":
            return super().build_objective()
        return build_flow(self.config)

    def build_networks(self) -> dict[str, nn.Module]:
        import torch

        if self.config.model_config is None:
            return {"unet": self.base_model.unet(torch.float32)}
        folders = [self.base_model.folder / name / "config.json" for name in self.base_model.text_encoder_names]
        encoders = [json.loads(path.read_text(encoding="utf-8")) for path in folders]
        widths = [sum(settings["hidden_size"] for settings in encoders)]
        widths += [encoders[-1]["projection_dim"]] if self.base_model.is_xl else []
        return {"unet": build_unet(self.config.model_config, self.latents.grid, *widths)}

    def save_pipeline(self, output_dir: Path) -> None:
        self.pipeline().save_pretrained(output_dir)
