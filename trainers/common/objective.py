"""Noising, regression targets, loss weights and timestep draws of diffusion training, in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainers.base import RandomSource

if TYPE_CHECKING:
    from diffusers import DDPMScheduler

Predict = Callable[[Tensor, Tensor], Tensor]  # (noisy [B, ...], timesteps [B]) -> what the network says [B, ...]


class DDPMObjective:
    """Denoising regression of arXiv 2006.11239 with the min-SNR weights of arXiv 2303.09556.

    The scheduler's `prediction_type` says what the network predicts: epsilon, sample or v_prediction.
    """

    def __init__(self, scheduler: DDPMScheduler, snr_gamma: float | None = None) -> None:
        self.scheduler = scheduler
        self.snr_gamma = snr_gamma

    def loss(self, predict: Predict, clean: Tensor, rng: RandomSource) -> Tensor:
        """Returns the weighted squared error of one random timestep per example, [B]."""
        noise = rng.normal("noise", clean.shape[1:])
        timesteps = rng.integers("timestep", self.scheduler.config.num_train_timesteps)
        noisy = self.scheduler.add_noise(clean, noise, timesteps)
        error = predict(noisy, timesteps).float() - self.target(clean, noise, timesteps)
        return error.square().flatten(1).mean(1) * self.weight(timesteps)

    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        match self.scheduler.config.prediction_type:
            case "epsilon":
                return noise
            case "sample":
                return clean
            case "v_prediction":
                return self.scheduler.get_velocity(clean, noise, timesteps)
            case other:
                raise ValueError(f"prediction_type = {other}: must be one of epsilon, sample, v_prediction")

    def weight(self, timesteps: Tensor) -> Tensor:
        """The min-SNR weight of each example, [B]; 1 without snr_gamma."""
        if self.snr_gamma is None:
            return torch.ones_like(timesteps, dtype=torch.float32)
        from diffusers.training_utils import compute_snr

        snr = compute_snr(self.scheduler, timesteps)
        clipped = snr.clamp(max=self.snr_gamma)
        divisor = {"epsilon": snr, "sample": torch.ones_like(snr), "v_prediction": snr + 1}
        return clipped / divisor[self.scheduler.config.prediction_type]
