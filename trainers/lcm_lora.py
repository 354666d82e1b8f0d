"""Task `lcm_lora`: an adapter that lets a Stable Diffusion pipeline sample in four steps, arXiv 2311.05556."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from datasets_lib.errors import InputError
from trainers.base import BaseConfig, NonNegativeFloat, Positive, PositiveFloat
from trainers.common.diffusion.objective import Timesteps
from trainers.common.lora.options import AdapterConfig
from trainers.common.lora.training import ATTENTION, AdapterTrainer
from trainers.common.text_to_image.objective import QUARTERS, Learned
from trainers.common.text_to_image.options import OF_DENOISING

if TYPE_CHECKING:
    from torch import Tensor

    from trainers.common.class_pipeline import Condition
    from trainers.common.diffusion.consistency import Networks

# all layers of the UNet except the first and the last, as in the published adapters
EVERYWHERE = [
    *ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut",
    "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
]  # fmt: skip


@dataclass(kw_only=True)
class LCMLoRAConfig(AdapterConfig):
    rank: Positive = 64  # r: columns of A, rows of B
    target_modules: list[str] | str | None = None  # endings of the UNet's modules, or a pattern; null: its blocks
    num_ddim_timesteps: Positive = 50  # steps of the teacher's DDIM solver from noise to picture
    w_min: NonNegativeFloat = 5.0  # least guidance w of the teacher, drawn per example; its guidance_scale is 1 + w
    w_max: NonNegativeFloat = 15.0  # greatest w
    loss_type: Literal["l2", "huber"] = "huber"  # distance to the target; huber: sqrt(e^2 + c^2) - c
    huber_c: PositiveFloat = 0.001  # c of huber
    sampler: Literal["ddpm", "ddim", "dpmsolver++", "euler"] | None = None  # null: LCM's, for which the adapter is made
    num_inference_steps: Positive = 4  # steps of the sampler
    guidance_scale: NonNegativeFloat = 1.0  # 1: only the guidance that the adapter has learned

    def problems(self, base: BaseConfig) -> Iterator[tuple[str, str]]:
        yield from super().problems(base)
        yield from self.without_effect(OF_DENOISING, "the loss of task lora", False)
        if self.w_min > self.w_max:
            yield "w_min", f"must be at most w_max = {self.w_max:g}"
        if self.sampler is None and self.num_inference_steps > self.num_ddim_timesteps:
            yield "num_inference_steps", f"must be at most num_ddim_timesteps = {self.num_ddim_timesteps}"


class LCMLoRATrainer(AdapterTrainer):
    """Distils the guided base model into an adapter; the teacher is the same network without its adapter."""

    Config = LCMLoRAConfig
    config: LCMLoRAConfig
    task = "lcm_lora"
    usual_targets = EVERYWHERE
    usage = (
        "from diffusers import {pipeline}, LCMScheduler\n"
        "pipeline = {pipeline}.{reader}({base_model})\n"
        "settings = pipeline.scheduler.config\n"
        "pipeline.scheduler = LCMScheduler.from_config("
        "settings, original_inference_steps={num_ddim_timesteps}{unfound})\n"
        'pipeline.load_lora_weights("{output_dir}")\n'
        '{prepared}pipeline("a prompt"{clip_skip}, num_inference_steps=4, guidance_scale=1.0)'
        '.images[0].save("sample.png")'
    )

    def build_objective(self) -> Learned:
        from trainers.common.diffusion.consistency import ConsistencyObjective, lcm_scheduler

        config, base_model = self.config, self.base_model
        huber_c = config.huber_c if config.loss_type == "huber" else None
        scheduler = lcm_scheduler(base_model.sampler, config.num_ddim_timesteps)
        try:
            objective = ConsistencyObjective(scheduler, config.w_min, config.w_max, huber_c)
        except ValueError as error:
            raise InputError(f"{self.task}.{error} ({config.pretrained_model_name_or_path})") from None
        quarters = [
            ConsistencyObjective(scheduler, config.w_min, config.w_max, starts=part)
            for part in Timesteps(0, config.num_ddim_timesteps).parts(QUARTERS)
        ]
        return Learned(objective, quarters, base_model.training_scheduler(), scheduler)

    def _asking(self, condition: Condition) -> Networks:
        import torch

        from trainers.common.diffusion.consistency import Networks
        from trainers.common.lora.adapters import lora_scaled

        empty = {name: rows.to(condition[name].dtype).expand_as(condition[name]) for name, rows in self.empty().items()}
        both = {name: torch.cat([rows, empty.get(name, rows)]) for name, rows in condition.items()}

        def teacher(noisy: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
            """Predicts with and without the condition, in one forward of twice the batch."""
            with lora_scaled(self.modules.values(), 0.0):
                predictions = self._network(torch.cat([noisy, noisy]), torch.cat([timesteps, timesteps]), both)
            conditional, unconditional = predictions.float().chunk(2)
            return conditional, unconditional

        return Networks(super()._asking(condition), teacher)

    def about(self) -> dict[str, str]:
        return super().about() | {"num_ddim_timesteps": str(self.config.num_ddim_timesteps)}

    @classmethod
    def load_pipeline(cls, output_dir: str | Path) -> Any:
        """Loads the base model with the adapter and LCM's scheduler."""
        from trainers.common.diffusion.consistency import lcm_scheduler
        from trainers.common.lora.files import ddim_timesteps

        steps = ddim_timesteps(Path(output_dir)) or cls.Config.num_ddim_timesteps
        pipeline = super().load_pipeline(output_dir)
        pipeline.scheduler = lcm_scheduler(pipeline.scheduler, steps)
        return pipeline
