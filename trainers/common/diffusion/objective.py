"""Noising, regression targets, loss weights and time draws of diffusion and flow training, in float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainers.base import RandomSource

if TYPE_CHECKING:
    from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

Predict = Callable[[Tensor, Tensor], Tensor]  # (noisy [B, ...], timesteps [B]) -> what the network says [B, ...]


@dataclass(frozen=True)
class Part:
    """Part `number` of `count` equal parts of the time from pictures to noise."""

    number: int
    count: int


class Timesteps:
    """The distribution of the timesteps that are trained at: integers in [low, high), uniform but for a bias.

    With `weights` [high - low] a timestep is drawn in proportion to its weight.
    """

    def __init__(self, low: int, high: int, weights: Tensor | None = None) -> None:
        self.low, self.high = low, high
        self.cumulative = None if weights is None else (weights.double().cumsum(0) / weights.double().sum()).float()

    def draw(self, rng: RandomSource, name: str, part: Part | None = None) -> Tensor:
        """Timesteps [B]; those of a part are uniform."""
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

    The scheduler's `prediction_type` says what the network predicts: epsilon, sample or v_prediction. Beside it:
    `noise_offset` times one normal number per channel is added to the noise, and so to the target; the network sees
    `input_perturbation` times more noise than the target holds (arXiv 2301.11706); `huber_c` replaces the square by
    2 c (sqrt(e^2 + c^2) - c); `dream_detail_preservation` is p of arXiv 2312.00210, where the noise moves towards what
    the network makes of it, for epsilon.
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
        """Returns the weighted loss of one random timestep per example, [B].

        `mask` [B, 1, ...] in [0, 1] weighs pixels; `part` restricts the time; `prefix` names the draws.
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
        """The square, or the pseudo-Huber loss, which has the square's curvature at 0 and slope 2 c far from it."""
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
        """The noisy input and the target that hold s^p of what the network gets wrong, equations 5 and 6."""
        with torch.no_grad():
            wrong = noise - predict(noisy, timesteps).float()
        alpha_bar = self.scheduler.alphas_cumprod.to(noisy.device)[timesteps]
        s = (1 - alpha_bar).sqrt().reshape(-1, *[1] * (noisy.ndim - 1))
        moved = s**self.dream_detail_preservation * wrong
        return noisy + s * moved, noise + moved


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

    def loss(
        self,
        predict: Predict,
        clean: Tensor,
        rng: RandomSource,
        mask: Tensor | None = None,
        part: Part | None = None,
        prefix: str = "",
    ) -> Tensor:
        """Returns the squared error at one random time per example, [B]; see DDPMObjective.loss."""
        noise, times = rng.normal(f"{prefix}noise", clean.shape[1:]), self.times(rng, part, prefix)
        t = times.reshape(-1, *[1] * (clean.ndim - 1))
        error = predict((1 - t) * clean + t * noise, self.scale * times).float() - (noise - clean)
        return masked_mean(error.square(), mask)

    def times(self, rng: RandomSource, part: Part | None = None, prefix: str = "") -> Tensor:
        """Random times, [B]; those of a part are uniform, and are not shifted."""
        if part is not None:
            return (part.number + rng.uniform(f"{prefix}time")) / part.count
        if self.logit is None:
            times = rng.uniform(f"{prefix}time")
        else:
            mean, std = self.logit
            times = torch.sigmoid(mean + std * rng.normal(f"{prefix}time", ()))
        return self.shift * times / (1 + (self.shift - 1) * times)


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Means [B] over the pixels of values [B, C, ...], weighted by a mask [B, 1, ...]; 0 where the mask is empty."""
    if mask is None:
        return values.flatten(1).mean(1)
    weights = mask.expand_as(values).flatten(1)
    return (values.flatten(1) * weights).sum(1) / weights.sum(1).clamp(min=1e-6)
