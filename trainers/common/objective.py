"""Noising, regression targets, loss weights and time draws of diffusion and flow training, in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainers.base import RandomSource

if TYPE_CHECKING:
    from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

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


class RectifiedFlow:
    """Regression of the velocity along straight lines from pictures to noise, arXiv 2209.03003.

    At time t in [0, 1) the network sees (1 - t) x + t n, is told t times the scheduler's `num_train_timesteps`, and
    predicts n - x. Times are uniform, or logit-normal with `logit` = (mean, standard deviation), and the scheduler's
    `shift` moves them towards noise, arXiv 2403.03206, sections 3.1 and 5.3.2.
    """

    def __init__(self, scheduler: FlowMatchEulerDiscreteScheduler, logit: tuple[float, float] | None = None) -> None:
        self.scale = scheduler.config.num_train_timesteps
        self.shift = scheduler.config.shift
        self.logit = logit

    def loss(self, predict: Predict, clean: Tensor, rng: RandomSource) -> Tensor:
        """Returns the squared error at one random time per example, [B]."""
        noise, times = rng.normal("noise", clean.shape[1:]), self.times(rng)
        t = times.reshape(-1, *[1] * (clean.ndim - 1))
        error = predict((1 - t) * clean + t * noise, self.scale * times).float() - (noise - clean)
        return error.square().flatten(1).mean(1)

    def times(self, rng: RandomSource) -> Tensor:
        """Random times, [B]."""
        if self.logit is None:
            times = rng.uniform("time")
        else:
            mean, std = self.logit
            times = torch.sigmoid(mean + std * rng.normal("time", ()))
        return self.shift * times / (1 + (self.shift - 1) * times)
