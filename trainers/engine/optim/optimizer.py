"""The optimizer of the task's parameter groups: learning rate, clipping, and skipping of steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor
from torch.optim import Optimizer

from datasets_lib.errors import InputError
from trainers.base import TrainerConfig
from trainers.engine.distributed import deepspeed
from trainers.engine.distributed.sharding import whole
from trainers.engine.optim.table import OPTIMIZERS
from trainers.engine.run.clock import Clock


def build_optimizer(
    groups: list[dict[str, Any]], config: TrainerConfig, clock: Clock, device: torch.device
) -> Optimizer:
    """Builds the optimizer; scale_lr multiplies the rates by the global batch size."""
    for group in groups:
        if not group["params"]:
            raise InputError(f"network {group['name']} has no trainable parameters; set requires_grad or leave it out")
        dtypes = {p.dtype for p in group["params"]} - {torch.float32}
        if dtypes:
            raise InputError(f"network {group['name']} trains weights in {dtypes}; small updates vanish, use float32")
        group["initial_lr"] = group["lr"] * (clock.global_batch_size if config.scale_lr else 1)
    return OPTIMIZERS[config.optimizer].build(groups, config, device)


def learning_rate_schedule(config: TrainerConfig, total_steps: int) -> Callable[[int], float]:
    """Returns the learning rate's factor as a function of the optimizer step, from 0."""
    name, warmup = config.lr_scheduler, warmup_steps(config, total_steps)
    if name == "one_cycle":
        return lambda step: _one_cycle(step, warmup, total_steps)
    if name == "warmup_cosine":
        return lambda step: _warmup_cosine(step, warmup, total_steps)
    return _library_schedule(config, int(warmup), total_steps)


def warmup_steps(config: TrainerConfig, total_steps: int) -> float:
    """`lr_warmup_steps`, or the schedule's own; not rounded for one_cycle, as in torch."""
    if config.lr_warmup_steps is not None:
        return config.lr_warmup_steps
    own = {"constant": 0, "one_cycle": 0.3 * total_steps, "warmup_cosine": round(0.15 * total_steps)}
    return own.get(config.lr_scheduler, min(500, total_steps // 10))


def _library_schedule(config: TrainerConfig, warmup: int, total_steps: int) -> Callable[[int], float]:
    """Extracts the function of the step from a scheduler of diffusers or transformers."""
    scratch = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    if config.lr_scheduler == "cosine_with_min_lr":
        from transformers import get_cosine_with_min_lr_schedule_with_warmup

        low = config.lr_min_ratio
        scheduler = get_cosine_with_min_lr_schedule_with_warmup(scratch, warmup, total_steps, min_lr_rate=low)
    else:
        from diffusers.optimization import get_scheduler

        name, cycles, power = config.lr_scheduler, config.lr_num_cycles, config.lr_power
        scheduler = get_scheduler(name, scratch, None, warmup, total_steps, cycles, power)
    return scheduler.lr_lambdas[0]


def _cosine_between(high: float, low: float, part: float) -> float:
    return low + (high - low) * (1 + math.cos(math.pi * part)) / 2


def _one_cycle(step: int, warmup: float, total_steps: int) -> float:
    """torch's OneCycleLR with its defaults: from 1/25 up to 1, then down to 1/25e4 at the last step."""
    peak, last = max(warmup - 1, 0), total_steps - 1
    if step <= peak and peak > 0:
        return _cosine_between(1 / 25, 1.0, step / peak)
    return _cosine_between(1.0, 1 / 25e4, (step - peak) / max(last - peak, 1))


def _warmup_cosine(step: int, warmup: float, total_steps: int) -> float:
    """Linear from 0.1 to 1 over the warm-up, then a cosine to 0."""
    if step < warmup:
        return 0.1 + 0.9 * step / warmup
    return _cosine_between(1.0, 0.0, (step - warmup) / max(total_steps - warmup, 1))


def set_learning_rates(optimizer: Optimizer, factor: float) -> dict[str, float]:
    """Sets every group's rate; returns the first one's as "lr", the others' as "lr/<group>"."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    first, *others = optimizer.param_groups
    return {"lr": first["lr"]} | {f"lr/{group['name']}": group["lr"] for group in others}


def optimizer_step(
    accelerator: Accelerator, optimizer: AcceleratedOptimizer, max_grad_norm: float | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clips each group, steps if all gradients are finite, and clears the gradients.

    Returns `applied`, a 0-dim float tensor that is 0 if the step was skipped, and the norms before clipping as
    {"grad_norm/<group>": norm}, both on the device. All ranks agree, as averaged gradients are the same on all.
    """
    if deepspeed.in_use(accelerator):
        return deepspeed.step(accelerator, optimizer)
    accelerator.unscale_gradients(optimizer)
    norms = {f"grad_norm/{group['name']}": _clip(group["params"], max_grad_norm) for group in optimizer.param_groups}
    applied = torch.stack(list(norms.values())).isfinite().all().float()
    inner = optimizer.optimizer
    if accelerator.scaler is not None:
        optimizer.step()  # the scaler skips on its own finding
    elif applied.device.type != "cpu" and inner.defaults.get("fused"):
        inner.found_inf = 1 - applied  # a fused kernel leaves weights and state alone if this is 1
        inner.step()  # accelerate's wrapper looks for packages in every call
    elif applied.item():
        inner.step()
    inner.zero_grad()
    return applied, norms


def _clip(parameters: list[Tensor], max_grad_norm: float | None) -> Tensor:
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:  # a network without a loss in this step
        return parameters[0].new_zeros(())
    norm = whole(torch.nn.utils.get_total_norm(gradients))
    if max_grad_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
    return norm
