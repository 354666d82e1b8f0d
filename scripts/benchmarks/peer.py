"""The pip package denoising-diffusion-pytorch: its network as a diffloop task, and its own loop around it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from denoising_diffusion_pytorch.classifier_free_guidance import GaussianDiffusion, Unet
from ema_pytorch import EMA
from safetensors.torch import save_file
from torch import Tensor, nn

import datasets_lib
from scripts.benchmarks.runs import DEVICE
from trainers.base import Positive
from trainers.common.class_pipeline import Condition
from trainers.common.diffusion.class_diffusion import ClassDiffusionConfig, ClassDiffusionTrainer
from trainers.common.model_files import Grid
from trainers.engine.config.config import RunConfig
from trainers.engine.optim.optimizer import learning_rate_schedule
from trainers.engine.validation.metrics import pictures_of

CONFIG = str(Path(__file__).with_name("peer.yaml"))
NUM_CLASSES, MAX_GRAD_NORM = 10, 1.0  # the norm is the default of a run


@dataclass(kw_only=True)
class PeerConfig(ClassDiffusionConfig):
    """Options of the section `peer`."""

    dim: Positive = 32  # width of the first level
    dim_mults: list[int] = field(default_factory=lambda: [1, 2, 2])  # widths of the levels over the first one's


def build_unet(config: Any, drop: float) -> Unet:
    """The package's network; it drops labels with probability `drop` unless it is given which to keep."""
    return Unet(config.dim, NUM_CLASSES, cond_drop_prob=drop, dim_mults=tuple(config.dim_mults), channels=1)


class PeerTrainer(ClassDiffusionTrainer):
    """conditional_ddpm around the other network: the label `num_classes` means that there is no class."""

    Config = PeerConfig
    task = "peer"
    usage = "see scripts/benchmarks/peer_quality.py"

    def build_network(self, grid: Grid) -> nn.Module:
        return build_unet(self.config, 0.0)

    def _network(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        labels = condition["class_labels"]
        timesteps = torch.as_tensor(timesteps, device=noisy.device).expand(len(noisy))
        kept = {"cond_keep_mask": labels < NUM_CLASSES}
        return self.modules["unet"](noisy, timesteps, labels.clamp(max=NUM_CLASSES - 1), **kept)

    def save_pipeline(self, output_dir: Path) -> None:
        output_dir.mkdir(parents=True)
        save_file(self.raw("unet").state_dict(), output_dir / "unet.safetensors")


class Package:
    """The loop of the package's documentation around its GaussianDiffusion, with AdamW, clipping and averaging."""

    def __init__(self, run: RunConfig, update_every: int, fp16: bool = False) -> None:
        config: Any = run.config
        torch.manual_seed(run.base.seed)  # as diffloop does before it builds its networks
        unet = build_unet(config, config.label_dropout)
        steps = {"sampling_timesteps": config.ddpm_num_inference_steps}
        self.diffusion = GaussianDiffusion(unet, image_size=run.base.resolution, **steps).to(DEVICE)
        self.averaged = EMA(self.diffusion, beta=0.995, update_every=update_every)
        self.optimizer = torch.optim.AdamW(self.diffusion.parameters(), lr=config.learning_rate)
        factor = learning_rate_schedule(config, run.base.max_train_steps or 0)
        self.rates = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        self.fp16, self.scaler = fp16, torch.amp.GradScaler("cuda", enabled=fp16)

    def step(self, images: Tensor, labels: Tensor) -> None:
        """Trains on pictures in [0, 1]."""
        with torch.autocast("cuda", torch.float16, enabled=self.fp16):
            loss = self.diffusion(images, classes=labels)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.diffusion.parameters(), MAX_GRAD_NORM)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.rates.step()
        self.optimizer.zero_grad()
        self.averaged.update()

    def draw(self, scale: float, labels: Tensor) -> Tensor:
        """Its own sampler, which cannot draw at scale 1: its network returns one value there instead of two."""
        scale = 1.0 + 1e-6 if scale == 1.0 else scale
        return self.averaged.ema_model.eval().sample(labels.to(DEVICE), cond_scale=scale).clamp(0, 1)


def digits_of(run: RunConfig, split: str = "train") -> tuple[Tensor, Tensor]:
    """All pictures in [0, 1] and their labels."""
    dataset: Any = datasets_lib.build(run.base, split)
    images, labels = next(pictures_of(dataset, list(range(len(dataset))), len(dataset)))
    assert labels is not None
    return images, labels
