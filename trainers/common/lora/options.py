"""Options of tasks that train low-rank adapters."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from trainers.base import BaseConfig, Fraction, NonNegativeFloat, Positive, PositiveFloat
from trainers.common.text_to_image.options import StableDiffusionConfig


@dataclass(kw_only=True)
class AdapterConfig(StableDiffusionConfig):
    """Options of the UNet's adapter, arXiv 2106.09685."""

    free_on_resume: ClassVar[tuple[str, ...]] = (*StableDiffusionConfig.free_on_resume, "lora_scale", "lora_formats")
    training_only: ClassVar[tuple[str, ...]] = (*StableDiffusionConfig.training_only, "lora_weights", "lora_formats")

    exports_networks: ClassVar[bool] = False

    rank: Positive = 16  # r: columns of A, rows of B
    lora_alpha: PositiveFloat | None = None  # alpha: the adapter is scaled by alpha / r; null: r, a scale of 1
    lora_dropout: Fraction = 0.0  # fraction of the adapters' inputs dropped in training
    target_modules: list[str] | str | None = None  # endings of the UNet's modules, or one pattern; null: its attention
    use_rslora: bool = False  # scale by alpha / sqrt(r) (arXiv 2312.03732)
    use_dora: bool = False  # also train the norm of each row of weights (arXiv 2402.09353)
    init_lora_weights: Literal["gaussian", "kaiming"] = "gaussian"  # of A; B starts at 0
    lora_weights: str | None = None  # a LoRA file, or its folder, to continue from; null: a new adapter
    use_ema: bool = False  # average the adapter's weights
    lora_scale: NonNegativeFloat = 1.0  # factor on the adapter in validation pictures; 0: off
    lora_formats: list[Literal["diffusers", "kohya"]] | None = None  # files; kohya: ComfyUI's, A1111's; null: both

    def problems(self, base: BaseConfig) -> Iterator[tuple[str, str]]:
        yield from super().problems(base)
        resumed = bool(base.resume_from_checkpoint)  # then the checkpoint holds the adapter
        if self.lora_weights is not None and not resumed and not Path(self.lora_weights).exists():
            yield "lora_weights", "there is no such file or folder"
        if self.lora_formats is not None and "diffusers" not in self.lora_formats:
            yield "lora_formats", "must contain diffusers, whose file scripts and load_lora_weights read; or be null"
        yield from (("target_modules", problem) for problem in target_problems(self.target_modules))


def target_problems(targets: list[str] | str | None) -> Iterator[str]:
    """Yields problems of target modules: endings of names, or one pattern."""
    if targets in ([], ""):
        yield "must name at least one module, or be null"
    elif isinstance(targets, str):
        try:
            re.compile(targets)
        except re.error as error:
            yield f"is no pattern (a regular expression that matches modules' names): {error}"
