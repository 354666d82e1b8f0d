"""Sampling, the reverse process from noise to pictures, with any of diffusers' schedulers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from inspect import signature
from typing import TYPE_CHECKING, Any

from datasets_lib.errors import InputError

if TYPE_CHECKING:
    import torch
    from diffusers import SchedulerMixin
    from torch import Tensor


def initial_noise(shape: tuple[int, ...], generators: list[torch.Generator], device: torch.device) -> Tensor:
    """Draws noise [B, *shape] with one generator per example, as diffusers' pipelines do."""
    from diffusers.utils.torch_utils import randn_tensor

    return randn_tensor((len(generators), *shape), generator=generators, device=device)


def denoise(
    predict: Callable[[Tensor, Tensor], Tensor],
    scheduler: SchedulerMixin,
    noise: Tensor,
    num_inference_steps: int,
    generators: list[torch.Generator] | torch.Generator | None,
    progress: Callable[[Iterable], Iterable] = iter,
    after_step: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Runs the reverse process on a copy of `scheduler`; a pipeline with the same generators draws the same."""
    scheduler = _fresh(scheduler)  # set_timesteps changes a scheduler
    scheduler.set_timesteps(num_inference_steps)
    scale = getattr(scheduler, "scale_model_input", lambda sample, timestep: sample)  # a flow has none
    random = {"generator": generators} if "generator" in signature(scheduler.step).parameters else {}
    sample = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    for timestep in progress(scheduler.timesteps):
        prediction = predict(scale(sample, timestep), timestep).float()
        sample = scheduler.step(prediction, timestep, sample, **random).prev_sample
        if after_step is not None:
            after_step(sample)
    return sample


def _fresh(scheduler: SchedulerMixin) -> SchedulerMixin:
    """Makes a scheduler with the same settings; `from_config` would warn of those of the kind that it was made from."""
    known = signature(type(scheduler)).parameters
    return type(scheduler)(**{name: value for name, value in scheduler.config.items() if name in known})


def build_sampler(name: str, scheduler: SchedulerMixin) -> SchedulerMixin:
    """Builds the sampler ddpm, ddim, dpmsolver++ or euler (of a flow one of the last two) for a training schedule.

    Raises ValueError for any other name.
    """
    import diffusers

    if isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler):
        if name == "dpmsolver++":
            config = scheduler.config
            settings = {"num_train_timesteps": config.num_train_timesteps, "flow_shift": config.shift}
            settings |= {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
            return diffusers.DPMSolverMultistepScheduler(**settings)
        if name != "euler":
            raise InputError(f"sampler = {name}: a flow has euler or dpmsolver++")
        return type(scheduler).from_config(scheduler.config)
    if name == "ddim":
        return diffusers.DDIMScheduler.from_config(scheduler.config)
    if name == "dpmsolver++":
        return diffusers.DPMSolverMultistepScheduler.from_config(scheduler.config, algorithm_type="dpmsolver++")
    if name == "euler":
        return diffusers.EulerDiscreteScheduler.from_config(scheduler.config)
    if name != "ddpm":
        raise InputError(f"sampler = {name}: must be one of ddpm, ddim, dpmsolver++, euler")
    return type(scheduler).from_config(scheduler.config)


def trained_with(sampler: SchedulerMixin) -> SchedulerMixin:
    """Recovers the training schedule of a pipeline with this sampler, for build_sampler."""
    from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

    config = sampler.config
    if config.get("use_flow_sigmas"):
        return FlowMatchEulerDiscreteScheduler(config.num_train_timesteps, shift=config.flow_shift)
    return DDPMScheduler.from_config(config, clip_sample=False, thresholding=False)


def adapted_sampler(sampler: SchedulerMixin, changes: Mapping[str, Any]) -> SchedulerMixin:
    """Returns a sampler with changed settings, of DDIM if its own kind lacks zero terminal SNR."""
    if changes.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in sampler.config:
        sampler = build_sampler("ddim", trained_with(sampler))  # it is one like PNDM
    return type(sampler).from_config(sampler.config, **changes)


def to_unit_range(sample: Tensor) -> Tensor:
    """Maps pixels from [-1, 1] to [0, 1], clamped."""
    return (sample / 2 + 0.5).clamp(0, 1)
