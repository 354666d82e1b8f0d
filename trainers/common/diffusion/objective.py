"""Objectives of diffusion and flow training in float32: noising, targets, loss weights, distribution of times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainers.base import RandomSource

if TYPE_CHECKING:
    from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

Predict = Callable[[Tensor, Tensor], Tensor]  # (noisy [B, ...], timesteps [B]) -> prediction [B, ...]


@dataclass(frozen=True)
class Part:
    """Part `number` (from 0) of `count` equal parts of the time from pictures to noise."""

    number: int
    count: int


class Timesteps:
    """The distribution of training timesteps, integers in [low, high).

    It is uniform, or in proportion to `weights` [high - low].
    """

    def __init__(self, low: int, high: int, weights: Tensor | None = None) -> None:
        self.low, self.high = low, high
        self.cumulative = None if weights is None else (weights.double().cumsum(0) / weights.double().sum()).float()

    def draw(self, rng: RandomSource, name: str, part: Part | None = None) -> Tensor:
        """Draws timesteps [B]; uniform within a part if one is given."""
        if part is not None:
            span = self.high - self.low
            first, last = (self.low + span * edge // part.count for edge in (part.number, part.number + 1))
            return first + rng.integers(name, max(last - first, 1))
        if self.cumulative is None:
            return self.low + rng.integers(name, self.high - self.low)
        drawn = rng.uniform(name)
        self.cumulative = self.cumulative.to(drawn.device)  # once
        places = torch.searchsorted(self.cumulative, drawn, right=True)
        return self.low + places.clamp(max=self.high - self.low - 1)


class DDPMObjective:
    """Denoising regression of arXiv 2006.11239 with the min-SNR weights of arXiv 2303.09556.

    The scheduler's `prediction_type` is the network's target: epsilon, sample or v_prediction. `noise_offset` times a
    normal number per channel is added to the noise, and so to the target. `input_perturbation` times further noise is
    added to the input only (arXiv 2301.11706). `huber_c` replaces the square by 2 c (sqrt(e^2 + c^2) - c).
    `dream_detail_preservation` is p of arXiv 2312.00210, for epsilon.
    """

    def __init__(
        self,
        scheduler: DDPMScheduler,
        snr_gamma: float | None = None,
        noise_offset: float = 0.0,
        input_perturbation: float = 0.0,
        huber_c: float | None = None,
        dream_detail_preservation: float | None = None,
        timesteps: Timesteps | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.snr_gamma = snr_gamma
        self.noise_offset, self.input_perturbation = noise_offset, input_perturbation
        self.huber_c = huber_c
        self.dream_detail_preservation = dream_detail_preservation
        self.timesteps = timesteps or Timesteps(0, scheduler.config.num_train_timesteps)

    def loss(
        self,
        predict: Predict,
        clean: Tensor,
        rng: RandomSource,
        mask: Tensor | None = None,
        part: Part | None = None,
        prefix: str = "",
    ) -> Tensor:
        """Returns the weighted loss [B] at one random timestep per example.

        `mask` [B, 1, ...] in [0, 1] weights pixels; `part` restricts the time; `prefix` starts the names of the draws.
        """
        noise = rng.normal(f"{prefix}noise", clean.shape[1:])
        if self.noise_offset:
            offset = rng.normal(f"{prefix}noise_offset", clean.shape[1:2])
            noise = noise + self.noise_offset * offset.reshape(*offset.shape, *[1] * (clean.ndim - 2))
        added = noise
        if self.input_perturbation:
            added = noise + self.input_perturbation * rng.normal(f"{prefix}input_perturbation", clean.shape[1:])
        timesteps = self.timesteps.draw(rng, f"{prefix}timestep", part)
        noisy = self.scheduler.add_noise(clean, added, timesteps)
        target = self.target(clean, noise, timesteps)
        if self.dream_detail_preservation is not None:
            noisy, target = self._dream(predict, noisy, target, timesteps)
        error = predict(noisy, timesteps).float() - target
        return masked_mean(self.penalty(error), mask) * self.weight(timesteps)

    def penalty(self, error: Tensor) -> Tensor:
        """The squared error, or the pseudo-Huber loss, with the same curvature at 0 and slope 2 c far from it."""
        if self.huber_c is None:
            return error.square()
        return 2 * self.huber_c * ((error.square() + self.huber_c**2).sqrt() - self.huber_c)

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

    def _dream(self, predict: Predict, noisy: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Adds s^p times the network's error to the input and the target, equations 5 and 6 of arXiv 2312.00210."""
        with torch.no_grad():
            wrong = noise - predict(noisy, timesteps).float()
        alpha_bar = self.scheduler.alphas_cumprod.to(noisy.device)[timesteps]
        s = (1 - alpha_bar).sqrt().reshape(-1, *[1] * (noisy.ndim - 1))
        moved = s**self.dream_detail_preservation * wrong
        return noisy + s * moved, noise + moved


class RectifiedFlow:
    """Regression of the velocity along straight lines from pictures to noise, arXiv 2209.03003.

    At time t in [0, 1) the network gets (1 - t) x + t n and the timestep t * num_train_timesteps of the scheduler, and
    predicts n - x. Times are uniform, or logit-normal with `logit` = (mean, standard deviation), and the scheduler's
    `shift` moves them towards noise (arXiv 2403.03206, sections 3.1 and 5.3.2).
    """

    def __init__(self, scheduler: FlowMatchEulerDiscreteScheduler, logit: tuple[float, float] | None = None) -> None:
        self.scale = scheduler.config.num_train_timesteps
        self.shift = scheduler.config.shift
        self.logit = logit

    def loss(
        self,
        predict: Predict,
        clean: Tensor,
        rng: RandomSource,
        mask: Tensor | None = None,
        part: Part | None = None,
        prefix: str = "",
    ) -> Tensor:
        """Returns the squared error [B] at one random time per example; see DDPMObjective.loss."""
        noise, times = rng.normal(f"{prefix}noise", clean.shape[1:]), self.times(rng, part, prefix)
        t = times.reshape(-1, *[1] * (clean.ndim - 1))
        error = predict((1 - t) * clean + t * noise, self.scale * times).float() - (noise - clean)
        return masked_mean(error.square(), mask)

    def times(self, rng: RandomSource, part: Part | None = None, prefix: str = "") -> Tensor:
        """Draws times [B]; uniform and without shift within a part if one is given."""
        if part is not None:
            return (part.number + rng.uniform(f"{prefix}time")) / part.count
        if self.logit is None:
            times = rng.uniform(f"{prefix}time")
        else:
            mean, std = self.logit
            times = torch.sigmoid(mean + std * rng.normal(f"{prefix}time", ()))
        return self.shift * times / (1 + (self.shift - 1) * times)


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Means [B] over the pixels of values [B, C, ...], weighted by a mask [B, 1, ...]; 0 if the mask is empty."""
    if mask is None:
        return values.flatten(1).mean(1)
    weights = mask.expand_as(values).flatten(1)
    return (values.flatten(1) * weights).sum(1) / weights.sum(1).clamp(min=1e-6)
