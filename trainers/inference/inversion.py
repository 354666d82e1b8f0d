"""DDIM inversion, from a picture to the noise from which DDIM redraws it; interpolation of such noises."""

from __future__ import annotations

from inspect import signature
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm.auto import tqdm

from datasets_lib.errors import InputError
from trainers.common.autoencoder.latents import encode
from trainers.common.diffusion.objective import Predict

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDIMInverseScheduler, DDIMScheduler, SchedulerMixin

PREDICTIONS = ("epsilon", "v_prediction", "sample")
PARALLEL = 1e-6  # sine of the angle below which vectors count as parallel


def ddim_schedulers(scheduler: SchedulerMixin, steps: int) -> tuple[DDIMScheduler, DDIMInverseScheduler]:
    """Makes DDIM (arXiv 2010.02502) with the noise of a pipeline's scheduler, and its inverse with the same steps.

    The pipeline's scheduler itself need not be DDIM, and DDIM cannot invert PNDM's or Euler's steps. Raises ValueError
    for a flow, and for a number of steps that does not fit the timesteps.
    """
    from diffusers import DDIMInverseScheduler, DDIMScheduler

    config = scheduler.config
    predicts, total = config.get("prediction_type", "epsilon"), config.num_train_timesteps
    if "Flow" in type(scheduler).__name__ or predicts not in PREDICTIONS:
        found = f"{type(scheduler).__name__}, {predicts}"
        raise InputError(f"the base's scheduler is of a flow ({found}); DDIM inversion needs {', '.join(PREDICTIONS)}")
    spacing = "trailing" if config.get("timestep_spacing") == "trailing" else "leading"
    # clipping, the default of both, is meant for pixels and cannot be inverted
    changes = {"clip_sample": False, "thresholding": False, "timestep_spacing": spacing}
    forward = DDIMScheduler.from_config(config, **changes)
    known = signature(DDIMInverseScheduler.__init__).parameters  # it would warn of others
    back = DDIMInverseScheduler(**{name: value for name, value in forward.config.items() if name in known})
    allowed = f"give 1 to {total - 1}"
    if not 0 < steps < total:
        raise InputError(f"steps = {steps}: {allowed}")
    for each in (forward, back):
        each.set_timesteps(steps)
    times = forward.timesteps
    if len(times) != steps or times.min() < 0 or times.max() >= total or not torch.equal(times, back.timesteps.flip(0)):
        raise InputError(f"steps = {steps}: the {total} timesteps cannot be divided so; {allowed}, such as 50")
    return forward, back


@torch.no_grad()
def picture_latents(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Encodes pictures [B, C, H, W] in [-1, 1] to the scaled mode of the posterior."""
    mean = encode(vae, pictures)["mean"].float()
    return (mean - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


@torch.no_grad()
def invert(predict: Predict, inverse: DDIMInverseScheduler, latents: Tensor) -> Tensor:
    """Inverts latents to noise of the same shape, with the prediction at the start of each inverted step.

    DDIM would need the prediction at the step's other end, which is not known yet; the error shrinks with more steps.
    `predict` must be without guidance, which increases the error.
    """
    for timestep in tqdm(inverse.timesteps, "inverting"):
        latents = inverse.step(predict(latents, timestep).float(), timestep, latents).prev_sample
    return latents


def slerp(first: Tensor, last: Tensor, weight: float) -> Tensor:
    """Spherical interpolation: sin((1 - w) a) / sin(a) first + sin(w a) / sin(a) last, a the angle between them.

    All of a tensor is one vector; computed in float64, returned in the dtype of `first`. Parallel vectors are
    interpolated linearly, the limit of the formula. Raises ValueError for opposite ones, which have no shortest path.
    """
    a, b = first.double(), last.double()
    # Kahan's formula: an arc cosine would lose half the digits of small angles
    scaled, other = a * b.norm(), b * a.norm()
    angle = 2 * torch.atan2((scaled - other).norm(), (scaled + other).norm())
    sine = angle.sin()
    if sine < PARALLEL and angle > 1:
        raise InputError("the two noises point in opposite directions: between them no way is the shortest")
    if sine < PARALLEL:
        return torch.lerp(a, b, weight).to(first.dtype)
    return (((1 - weight) * angle).sin() / sine * a + (weight * angle).sin() / sine * b).to(first.dtype)


def with_statistics_between(latents: Tensor, first: Tensor, last: Tensor, weight: float) -> Tensor:
    """AdaIN (arXiv 1703.06868): gives `latents` channel means and standard deviations between those of two others.

    All are [B, c, h, w]; (1 - weight) times the first's statistics plus weight times the last's.
    """

    def statistics(rows: Tensor) -> tuple[Tensor, Tensor]:
        return rows.mean((2, 3), keepdim=True), rows.std((2, 3), keepdim=True)

    mean, deviation = (torch.lerp(a, b, weight) for a, b in zip(statistics(first), statistics(last), strict=True))
    own_mean, own_deviation = statistics(latents)
    return (latents - own_mean) / own_deviation * deviation + mean
