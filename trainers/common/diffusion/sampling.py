"""Where sampling begins, by which scheduler, and what becomes of its result; the process is in class_pipeline.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from datasets_lib.errors import InputError
from datasets_lib.foreign import shown

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
    """Runs the reverse process as the class-conditional pipeline does, with the same draws from the generators."""
    from trainers.common import class_pipeline

    return class_pipeline.denoise(predict, scheduler, noise, num_inference_steps, generators, progress, after_step)


def build_sampler(name: str, scheduler: SchedulerMixin) -> SchedulerMixin:
    """Builds a sampler by its name as the class-conditional pipeline does; ValueError for another name."""
    from trainers.common.class_pipeline import find_sampler

    try:
        return find_sampler(name, scheduler)
    except ValueError as error:
        raise InputError(shown(error)) from None


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
