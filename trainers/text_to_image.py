"""Task `text_to_image`: a Stable Diffusion pipeline's whole UNet, fine-tuned or from scratch, arXiv 2112.10752."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from datasets_lib.foreign import in_quotes
from trainers.base import BaseConfig, CardFacts, PositiveFloat
from trainers.common.diffusion.objective import ObjectiveOptions
from trainers.common.text_to_image.objective import Learned, build_flow
from trainers.common.text_to_image.options import OF_DENOISING, StableDiffusionConfig
from trainers.common.text_to_image.stable_diffusion import StableDiffusionTrainer
from trainers.common.text_to_image.unet2d_condition import build_unet, unet_problems

if TYPE_CHECKING:
    from torch import nn


@dataclass(kw_only=True)
class UNetConfig(StableDiffusionConfig):
    """Options of a whole UNet."""

    free_on_resume: ClassVar[tuple[str, ...]] = (*StableDiffusionConfig.free_on_resume, "model_config")
    initial_weights: ClassVar[tuple[str, ...]] = ()  # the base model's other parts are needed, too
    export_is_base_model: ClassVar[bool] = True

    learning_rate: PositiveFloat | dict[str, float] = 1e-5  # peak of the schedule
    model_config: str | None = None  # UNet from scratch: folder, JSON file or name in configs/models; null: the base's


@dataclass(kw_only=True)
class TextToImageConfig(ObjectiveOptions, UNetConfig):
    def problems(self, base: BaseConfig) -> Iterator[tuple[str, str]]:
        yield from super().problems(base)
        yield from self.objective_problems((*OF_DENOISING, "loss_type"))
        if self.is_flow and self.sampler not in (None, "euler", "dpmsolver++"):
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
        '{prepared}pipeline("a prompt"{clip_skip}).images[0].save("sample.png")'
    )

    def build_objective(self) -> Learned:
        return build_flow(self.config) if self.config.is_flow else super().build_objective()

    def build_networks(self) -> dict[str, nn.Module]:
        import torch

        if self.config.model_config is None:
            return {"unet": self.base_model.unet(torch.float32)}
        folders = [self.base_model.folder / name / "config.json" for name in self.base_model.text_encoder_names]
        encoders = [json.loads(path.read_text(encoding="utf-8")) for path in folders]
        widths = [sum(settings["hidden_size"] for settings in encoders)]
        widths += [encoders[-1]["projection_dim"]] if self.base_model.is_xl else []
        return {"unet": build_unet(self.config.model_config, self.latents.grid, *widths)}

    def card_facts(self) -> CardFacts:
        """Names the base model without a relation if the UNet is not the base's: the other parts are."""
        found = super().card_facts()
        return found if self.config.model_config is None else replace(found, base_model_relation=None)

    def usage_of(self, location: str | Path) -> str:
        return self.usage.format(**vars(self.config) | self.prompts.usage() | {"output_dir": in_quotes(location)})

    def save_pipeline(self, output_dir: Path) -> None:
        from trainers.common.text_to_image.pipeline_files import write_pipeline

        networks = {name: self.raw(name) for name in self.unwrapped}
        place = self.base_model, networks, self.learned.sampler, self.latents
        write_pipeline(output_dir, *place, kept=self.base.export_variant)
