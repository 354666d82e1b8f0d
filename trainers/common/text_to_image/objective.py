"""Builds the training objective of a Stable Diffusion UNet from the base model's noise and the run's options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from datasets_lib.errors import InputError
from trainers.common.diffusion.objective import DDPMObjective, ObjectiveOptions, RectifiedFlow, Timesteps
from trainers.common.diffusion.sampling import adapted_sampler, build_sampler
from trainers.common.text_to_image.base_model import BaseModel
from trainers.common.text_to_image.options import StableDiffusionConfig

if TYPE_CHECKING:
    from diffusers import DDPMScheduler, SchedulerMixin

    from trainers.common.diffusion.consistency import ConsistencyObjective

    Objective = DDPMObjective | RectifiedFlow | ConsistencyObjective

QUARTERS = 4  # equal parts of the time
TRAINING_ONLY = ("snr_gamma", "noise_offset", "input_perturbation", "dream_detail_preservation")


class Learned(NamedTuple):
    """An objective and its schedulers."""

    objective: Objective
    quarters: Sequence[Objective]  # for validation: each on a quarter of the time, without weights and extra noise
    scheduler: SchedulerMixin  # the noise of training
    sampler: SchedulerMixin  # of the finished pipeline


def build_diffusion(task: str, config: StableDiffusionConfig, base_model: BaseModel) -> Learned:
    """Builds the diffusion objective with the base model's noise, and its sampler unless that lacks an option.

    Raises ValueError if the base model does not fit the config.
    """
    changes = asked_of_scheduler(config)
    scheduler = base_model.training_scheduler(**changes)
    _check_prediction(task, config, scheduler)
    timesteps = build_timesteps(task, config, scheduler.config.num_train_timesteps)
    objective = DDPMObjective(
        scheduler,
        **{name: getattr(config, name) for name in TRAINING_ONLY},
        huber_c=config.huber_c if config.loss_type == "huber" else None,
        timesteps=timesteps,
    )
    own = adapted_sampler(base_model.sampler, changes)
    quarters = [DDPMObjective(scheduler, timesteps=part) for part in timesteps.parts(QUARTERS)]
    return Learned(objective, quarters, scheduler, own)


def asked_of_scheduler(config: StableDiffusionConfig) -> dict[str, Any]:
    """Returns the settings of the scheduler that the options name."""
    changes: dict[str, Any] = {}
    if config.prediction_type is not None:
        changes["prediction_type"] = config.prediction_type
    if config.rescale_betas_zero_snr:
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return changes


def _check_prediction(task: str, config: StableDiffusionConfig, scheduler: DDPMScheduler) -> None:
    """Checks options against the base model's prediction type; ValueError for a conflict."""
    predicts, source = scheduler.config.prediction_type, config.pretrained_model_name_or_path
    if predicts == "epsilon" and config.rescale_betas_zero_snr:
        found = "needs prediction_type: v_prediction, and the base model predicts epsilon"
        raise InputError(f"{task}.rescale_betas_zero_snr = true: {found} ({source})")
    if predicts != "epsilon" and config.dream_detail_preservation is not None:
        found = f"is defined for epsilon, and the base model predicts {predicts}"
        raise InputError(f"{task}.dream_detail_preservation = {config.dream_detail_preservation}: {found} ({source})")


def build_timesteps(task: str, config: StableDiffusionConfig, total: int) -> Timesteps:
    import torch

    low, high = config.timestep_range or (0, total)
    if high > total:
        raise InputError(f"{task}.timestep_range = {[low, high]}: the base model has {total} timesteps")
    weights = config.timestep_weights(low, high)
    if weights is not None and len(set(weights)) == 1:
        found = f"favours none of the timesteps {low} to {high - 1} over another"
        raise InputError(f"{task}.timestep_bias_strategy = {config.timestep_bias_strategy}: {found}; change its limits")
    return Timesteps(low, high, None if weights is None else torch.tensor(weights))


def build_flow(options: ObjectiveOptions) -> Learned:
    """Builds a rectified flow; pipelines sample it with DPM-Solver++."""
    objective = options.build_flow(num_train_timesteps=1000)
    scheduler = objective.scheduler
    quarters = [RectifiedFlow(scheduler, part=(number, QUARTERS)) for number in range(QUARTERS)]
    own = build_sampler("dpmsolver++", scheduler)  # StableDiffusionPipeline cannot use the Euler method of flows
    return Learned(objective, quarters, scheduler, own)
