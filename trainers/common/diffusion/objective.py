"""Objectives of diffusion and flow training in float32: noising, targets, loss weights, distribution of times."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from datasets_lib.errors import InputError
from trainers.base import PositiveFloat, RandomSource, Section

if TYPE_CHECKING:
    from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
    from torch import Tensor

Predict: TypeAlias = "Callable[[Tensor, Tensor], Tensor]"  # (noisy [B, ...], timesteps [B]) -> prediction [B, ...]


@dataclass(kw_only=True)
class ObjectiveOptions(Section):
    """The choice between diffusion and a rectified flow, and the training times of a flow."""

    objective: Literal["ddpm", "rectified_flow"] = "ddpm"  # training objective; a flow predicts noise minus picture
    time_distribution: Literal["uniform", "logit_normal"] = "uniform"  # of a flow's training times
    time_logit_mean: float = 0.0  # of logit_normal; below 0: closer to pictures than to noise
    time_logit_std: PositiveFloat = 1.0  # of logit_normal
    time_shift: PositiveFloat = 1.0  # shifts a flow's times towards noise, in sampling too; 3 is usual at 1024 pixels

    @property
    def is_flow(self) -> bool:
        return self.objective == "rectified_flow"

    def objective_problems(self, of_diffusion: Iterable[str]) -> Iterator[tuple[str, str]]:
        """Yields options that the objective or the distribution of times does not use."""
        logit_normal = self.time_distribution == "logit_normal"
        yield from self.without_effect(of_diffusion, "objective: ddpm", not self.is_flow)
        yield from self.without_effect(("time_distribution", "time_shift"), "objective: rectified_flow", self.is_flow)
        of_logit = ("time_logit_mean", "time_logit_std")
        yield from self.without_effect(of_logit, "time_distribution: logit_normal", logit_normal)

    def build_flow(self, num_train_timesteps: int) -> RectifiedFlow:
        from diffusers import FlowMatchEulerDiscreteScheduler

        # by keyword: diffusers' from_config drops positional arguments, taking them for defaults
        scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=num_train_timesteps, shift=self.time_shift)
        logit = (self.time_logit_mean, self.time_logit_std) if self.time_distribution == "logit_normal" else None
        return RectifiedFlow(scheduler, logit)


class Timesteps:
    """The distribution of training timesteps [low, high): uniform, or in proportion to `weights` [high - low]."""

    def __init__(self, low: int, high: int, weights: Tensor | None = None) -> None:
        self.low, self.high = low, high
        self.cumulative = None if weights is None else (weights.double().cumsum(0) / weights.double().sum()).float()

    def parts(self, count: int) -> list[Timesteps]:
        """Cuts the range into `count` parts of equal length, each with a uniform distribution."""
        edges = [self.low + (self.high - self.low) * number // count for number in range(count + 1)]
        return [Timesteps(first, max(last, first + 1)) for first, last in itertools.pairwise(edges)]

    def draw(self, rng: RandomSource, name: str) -> Tensor:
        """Draws timesteps, [B]."""
        import torch

        if self.cumulative is None:
            return self.low + rng.integers(name, self.high - self.low)
        drawn = rng.uniform(name)
        self.cumulative = self.cumulative.to(drawn.device)  # once
        places = torch.searchsorted(self.cumulative, drawn, right=True)
        return self.low + places.clamp(max=self.high - self.low - 1)


@dataclass
class DDPMObjective:
    """Denoising regression of arXiv 2006.11239 with the min-SNR weights of arXiv 2303.09556.

    The scheduler's `prediction_type` is the network's target: epsilon, sample or v_prediction. `noise_offset` times a
    normal number per channel is added to the noise, and so to the target. `input_perturbation` times further noise is
    added to the input only (arXiv 2301.11706). `huber_c` replaces the square by 2 c (sqrt(e^2 + c^2) - c).
    `dream_detail_preservation` is p of arXiv 2312.00210, for epsilon. `timesteps` are by default all, uniform.
    """

    scheduler: DDPMScheduler
    snr_gamma: float | None = None
    noise_offset: float = 0.0
    input_perturbation: float = 0.0
    huber_c: float | None = None
    dream_detail_preservation: float | None = None
    timesteps: Timesteps | None = None

    def loss(
        self, predict: Predict, clean: Tensor, rng: RandomSource, mask: Tensor | None = None, prefix: str = ""
    ) -> Tensor:
        """Returns the weighted loss [B] at one random timestep per example.

        `mask` [B, 1, ...] in [0, 1] weights pixels; `prefix` starts the names of the draws.
        """
        noise = rng.normal(f"{prefix}noise", clean.shape[1:])
        if self.noise_offset:
            noise = noise + self.noise_offset * columns(rng.normal(f"{prefix}noise_offset", clean.shape[1:2]), clean)
        added = noise
        if self.input_perturbation:
            added = noise + self.input_perturbation * rng.normal(f"{prefix}input_perturbation", clean.shape[1:])
        times = self.timesteps or Timesteps(0, self.scheduler.config.num_train_timesteps)
        timesteps = times.draw(rng, f"{prefix}timestep")
        noisy = self.scheduler.add_noise(clean, added, timesteps)
        target = self.target(clean, noise, timesteps)
        power = self.dream_detail_preservation
        if power is not None:
            noisy, target = self._dream(power, predict, noisy, target, timesteps)
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
                raise InputError(f"prediction_type = {other}: must be one of epsilon, sample, v_prediction")

    def weight(self, timesteps: Tensor) -> Tensor:
        """The min-SNR weight of each example, [B]; 1 without snr_gamma."""
        import torch

        if self.snr_gamma is None:
            return torch.ones_like(timesteps, dtype=torch.float32)
        from diffusers.training_utils import compute_snr

        snr = compute_snr(self.scheduler, timesteps)
        clipped = snr.clamp(max=self.snr_gamma)
        divisor = {"epsilon": snr, "sample": torch.ones_like(snr), "v_prediction": snr + 1}
        return clipped / divisor[self.scheduler.config.prediction_type]

    def _dream(
        self, power: float, predict: Predict, noisy: Tensor, noise: Tensor, timesteps: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Adds s^p times the network's error to the input and the target, equations 5 and 6 of arXiv 2312.00210."""
        import torch

        with torch.no_grad():
            wrong = noise - predict(noisy, timesteps).float()
        _, s = signal_and_noise(self.scheduler, timesteps, noisy)
        moved = s**power * wrong
        return noisy + s * moved, noise + moved


@dataclass
class RectifiedFlow:
    """Regression of the velocity along straight lines from pictures to noise, arXiv 2209.03003.

    At time t in [0, 1) the network gets (1 - t) x + t n and the timestep t * num_train_timesteps of the scheduler, and
    predicts n - x. Times are uniform, or logit-normal with `logit` = (mean, standard deviation), and the scheduler's
    `shift` moves them towards noise (arXiv 2403.03206, sections 3.1 and 5.3.2). With `part` = (number from 0, count)
    they are uniform in one of `count` equal parts of [0, 1), without a shift.
    """

    scheduler: FlowMatchEulerDiscreteScheduler
    logit: tuple[float, float] | None = None
    part: tuple[int, int] | None = None

    def loss(
        self, predict: Predict, clean: Tensor, rng: RandomSource, mask: Tensor | None = None, prefix: str = ""
    ) -> Tensor:
        """Returns the squared error [B] at one random time per example; see DDPMObjective.loss."""
        noise, times = rng.normal(f"{prefix}noise", clean.shape[1:]), self.times(rng, prefix)
        t, timesteps = columns(times, clean), self.scheduler.config.num_train_timesteps * times
        error = predict((1 - t) * clean + t * noise, timesteps).float() - (noise - clean)
        return masked_mean(error.square(), mask)

    def times(self, rng: RandomSource, prefix: str = "") -> Tensor:
        import torch

        if self.part is not None:
            number, count = self.part
            return (number + rng.uniform(f"{prefix}time")) / count
        if self.logit is None:
            times = rng.uniform(f"{prefix}time")
        else:
            mean, std = self.logit
            times = torch.sigmoid(mean + std * rng.normal(f"{prefix}time", ()))
        shift = self.scheduler.config.shift
        return shift * times / (1 + (shift - 1) * times)


def columns(values: Tensor, like: Tensor) -> Tensor:
    """Appends dimensions of size 1 to values [B] or [B, C], to broadcast them over `like` [B, C, ...]."""
    return values.reshape(*values.shape, *[1] * (like.ndim - values.ndim))


def signal_and_noise(scheduler: DDPMScheduler, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Returns sqrt(alpha_bar) and sqrt(1 - alpha_bar) of timesteps [B], to broadcast over `like`."""
    alpha_bar = columns(scheduler.alphas_cumprod.to(like.device)[timesteps], like)
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Means [B] over the pixels of values [B, C, ...], weighted by a mask [B, 1, ...]; 0 if the mask is empty."""
    if mask is None:
        return values.flatten(1).mean(1)
    weights = mask.expand_as(values).flatten(1)
    return (values.flatten(1) * weights).sum(1) / weights.sum(1).clamp(min=1e-6)
