"""Latent consistency distillation, arXiv 2310.04378: a student learns to skip steps of a guided teacher; float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from datasets_lib.errors import InputError
from trainers.base import RandomSource
from trainers.common.diffusion.objective import Predict, Timesteps, columns, masked_mean, signal_and_noise

if TYPE_CHECKING:
    from diffusers import LCMScheduler, SchedulerMixin

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


@dataclass(frozen=True)
class Networks:
    """A student to ask about the examples of a batch, and its teacher."""

    student: Predict
    teacher: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # the same -> conditional, unconditional prediction

    def __call__(self, noisy: Tensor, timesteps: Tensor) -> Tensor:
        return self.student(noisy, timesteps)


@dataclass
class ConsistencyObjective:
    """Trains a student to give the same output before and after a step of the guided teacher towards the picture.

    The scheduler's `original_inference_steps` N and `num_train_timesteps` T give the length k = T // N of a DDIM step
    (arXiv 2010.02502) and the starting timesteps k - 1, 2 k - 1, ..., N k - 1 (skipping, section 4.3). The teacher's
    guidance w is uniform in [w_min, w_max) per example. The target is the student itself, without gradient. `huber_c`
    is c of the distance sqrt(e^2 + c^2) - c; None: e^2. `starts` is the distribution of the starting timesteps'
    numbers in [0, N); None: uniform. Raises ValueError for a base model that does not fit.
    """

    scheduler: LCMScheduler
    w_min: float
    w_max: float
    huber_c: float | None = None
    starts: Timesteps | None = None

    def __post_init__(self) -> None:
        settings = self.scheduler.config
        steps, total = settings.original_inference_steps, settings.num_train_timesteps
        if total % steps:  # sampling would start with less noise than there is
            nearest = min((n for n in range(1, total + 1) if total % n == 0), key=lambda n: abs(n - steps))
            raise InputError(f"num_ddim_timesteps = {steps}: must divide the base's {total} timesteps; take {nearest}")
        if settings.prediction_type not in PREDICTION_TYPES:
            found = f"must be one of {', '.join(PREDICTION_TYPES)}; another base model is needed"
            raise InputError(f"prediction_type = {settings.prediction_type}: {found}")
        self.steps, self.skipped = steps, total // steps

    def loss(
        self, networks: Predict, clean: Tensor, rng: RandomSource, mask: Tensor | None = None, prefix: str = ""
    ) -> Tensor:
        """Returns the distance of equation 16 for one random step per example, [B]; see DDPMObjective.loss."""
        assert isinstance(networks, Networks), "the student needs a teacher"
        starts = self.starts or Timesteps(0, self.steps)
        timesteps = self.skipped * (starts.draw(rng, f"{prefix}timestep") + 1) - 1
        earlier = (timesteps - self.skipped).clamp(min=0)
        w = self.w_min + (self.w_max - self.w_min) * rng.uniform(f"{prefix}guidance")
        noisy = self.scheduler.add_noise(clean, rng.normal(f"{prefix}noise", clean.shape[1:]), timesteps)
        with torch.no_grad():
            prediction = guided(*networks.teacher(noisy, timesteps), w)
            stepped = self.ddim_step(prediction, noisy, timesteps, earlier)
            target = self.consistent(networks.student, stepped, earlier)
        error = self.consistent(networks.student, noisy, timesteps) - target
        return masked_mean(self.penalty(error), mask)

    def consistent(self, predict: Predict, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """f of equation 9: c_skip times the input plus c_out times the predicted picture; at t = 0 the input."""
        c_skip, c_out = self.scheduler.get_scalings_for_boundary_condition_discrete(timesteps)
        clean, _ = self.split(predict(noisy, timesteps).float(), noisy, timesteps)
        return columns(c_skip, noisy) * noisy + columns(c_out, noisy) * clean

    def ddim_step(self, prediction: Tensor, noisy: Tensor, timesteps: Tensor, earlier: Tensor) -> Tensor:
        """Steps to an earlier time along the predicted noise: equation 12 of arXiv 2010.02502, sigma = 0."""
        clean, noise = self.split(prediction, noisy, timesteps)
        a, s = signal_and_noise(self.scheduler, earlier, noisy)
        return a * clean + s * noise

    def split(self, prediction: Tensor, noisy: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Splits `noisy` into the picture and the noise that a prediction implies, each [B, ...]."""
        a, s = signal_and_noise(self.scheduler, timesteps, noisy)
        match self.scheduler.config.prediction_type:
            case "epsilon":
                return (noisy - s * prediction) / a, prediction
            case "sample":
                return prediction, (noisy - a * prediction) / s
            case _:  # v_prediction
                return a * noisy - s * prediction, a * prediction + s * noisy

    def penalty(self, error: Tensor) -> Tensor:
        """The squared error, or the pseudo-Huber distance, whose slope far from 0 is 1."""
        if self.huber_c is None:
            return error.square()
        return (error.square() + self.huber_c**2).sqrt() - self.huber_c


def lcm_scheduler(scheduler: SchedulerMixin, original_inference_steps: int) -> LCMScheduler:
    """Makes LCM's scheduler with a base's noise, whose file may rely on the defaults of its class."""
    from diffusers import LCMScheduler

    settings = {name: value for name, value in scheduler.config.items() if name != "_use_default_values"}
    settings |= {"clip_sample": False, "thresholding": False, "original_inference_steps": original_inference_steps}
    return LCMScheduler.from_config(settings)


def guided(conditional: Tensor, unconditional: Tensor, w: Tensor) -> Tensor:
    """(1 + w) conditional - w unconditional, equation 12, with w [B]: a guidance scale of 1 + w."""
    return conditional + columns(w, conditional) * (conditional - unconditional)
