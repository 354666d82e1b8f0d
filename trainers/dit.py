"""Task `dit`: a class-conditional diffusion transformer of pixels or latents, arXiv 2212.09748."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainers.common.diffusion.class_diffusion import ClassDiffusionConfig, ClassDiffusionTrainer, usage_by_class
from trainers.common.diffusion.dit_transformer import build_dit, dit_problems
from trainers.common.model_files import Grid

if TYPE_CHECKING:
    from torch import nn


@dataclass(kw_only=True)
class DiTConfig(ClassDiffusionConfig):
    def network_problems(self, grid: Grid) -> Iterator[str]:
        return dit_problems(self.model_config, grid)


class DiTTrainer(ClassDiffusionTrainer):
    """Trains a DiTTransformer2DModel, modulated by timestep and class; the result draws classes by name."""

    Config = DiTConfig
    task = "dit"
    network_name = "transformer"
    usage = usage_by_class("DiTTransformer2DModel", network_name)

    def build_network(self, grid: Grid) -> nn.Module:
        config = self.config
        return build_dit(config.model_config, config.pretrained_model_name_or_path, grid, self.num_classes)
