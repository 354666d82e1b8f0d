"""The network of the pip package denoising-diffusion-pytorch as a diffloop task, for compare_peer.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from denoising_diffusion_pytorch.classifier_free_guidance import Unet
from torch import Tensor, nn

from trainers.base import Positive
from trainers.common.diffusion.classes import count_classes
from trainers.common.diffusion.guidance import Condition, noise_levels
from trainers.common.diffusion.objective import DDPMObjective
from trainers.common.diffusion.pixel_diffusion import build_schedule
from trainers.conditional_ddpm import ConditionalDDPMConfig, ConditionalDDPMTrainer


@dataclass(kw_only=True)
class PeerConfig(ConditionalDDPMConfig):
    """Options of the section `peer`."""

    dim: Positive = 32  # width of the first level
    dim_mults: list[int] = field(default_factory=lambda: [1, 2, 2])  # widths of the levels over the first one's


def build_peer_unet(dim: int, dim_mults: list[int], num_classes: int, channels: int, drop: float) -> Unet:
    """The package's network; it drops labels with probability `drop` unless it is told which to keep."""
    return Unet(dim, num_classes, cond_drop_prob=drop, dim_mults=tuple(dim_mults), channels=channels)


class PeerTrainer(ConditionalDDPMTrainer):
    """conditional_ddpm around the other network: the label `num_classes` means that the class is not told."""

    Config = PeerConfig
    usage = "see scripts/benchmarks/compare_peer.py"

    def init_modules(self) -> dict[str, nn.Module]:
        config = self.config
        self.scheduler = build_schedule(config, prediction_type=config.prediction_type)
        self.sigma_of = noise_levels(self.scheduler)
        self.objective = DDPMObjective(self.scheduler, config.snr_gamma)
        self.num_classes = count_classes("peer", self, config.num_classes)
        self.columns = list(range(self.num_classes))
        self.grid_columns = len(self.columns)
        unet = build_peer_unet(config.dim, config.dim_mults, self.num_classes, self.base.channels, 0.0)
        return {"unet": unet}

    def _network(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        labels = condition["class_labels"]
        told = labels < self.num_classes
        timesteps = torch.as_tensor(timesteps, device=noisy.device).expand(len(noisy))
        return self.modules["unet"](noisy, timesteps, labels.clamp(max=self.num_classes - 1), cond_keep_mask=told)

    def save_pipeline(self, output_dir: Path) -> None:
        from safetensors.torch import save_file

        output_dir.mkdir(parents=True)
        save_file(self.raw("unet").state_dict(), output_dir / "unet.safetensors")

    @classmethod
    def load_pipeline(cls, output_dir: str | Path) -> Any:
        from safetensors.torch import load_file

        return load_file(Path(output_dir) / "unet.safetensors")
