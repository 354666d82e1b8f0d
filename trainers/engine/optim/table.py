"""The optimizers of the option `optimizer`: how each is built, and the engines that compute it unchanged."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from datasets_lib.errors import InputError
from trainers.base import TrainerConfig

if TYPE_CHECKING:
    import torch
    from torch.optim import Optimizer

ENGINES = ("DDP", "FSDP2", "ZeRO-2", "ZeRO-3")  # one process counts as DDP


class Row(NamedTuple):
    """One optimizer; a new one is a row and its `build(groups, config, device)` in this file.

    An elementwise update rule runs on all engines. FSDP2 and ZeRO divide weights, and ZeRO gives the optimizer flat
    pieces of several: factored moments, norms of a weight, or blocks of 8-bit state would silently differ. An engine
    belongs in the row once a test has compared it with one process.
    """

    build: Callable[[list[dict[str, Any]], TrainerConfig, torch.device], Optimizer]
    engines: tuple[str, ...]
    package: str | None = None  # required; also the name of diffloop's extra


def _adam_settings(config: TrainerConfig) -> dict[str, Any]:
    return {
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
    }


def _adamw(groups: list[dict[str, Any]], config: TrainerConfig, device: torch.device) -> Optimizer:
    """torch's, with fused kernels if they exist."""
    import torch

    return torch.optim.AdamW(groups, fused=device.type in ("cpu", "cuda", "mps"), **_adam_settings(config))


def _adamw_8bit(groups: list[dict[str, Any]], config: TrainerConfig, device: torch.device) -> Optimizer:
    """bitsandbytes', whose moments take a quarter of the memory."""
    if device.type != "cuda":
        raise InputError(f"optimizer = adamw_8bit: needs a CUDA device, this run is on {device.type}; set it to adamw")
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(groups, **_adam_settings(config))


OPTIMIZERS = {
    "adamw": Row(_adamw, ENGINES),
    "adamw_8bit": Row(_adamw_8bit, ("DDP",), package="bitsandbytes"),
}


def optimizer_problem(name: str) -> str | None:
    """Says what is wrong with the option `optimizer`; None if nothing is."""
    if name not in OPTIMIZERS:
        return f"must be one of {', '.join(OPTIMIZERS)}"
    package = OPTIMIZERS[name].package
    if package is not None and importlib.util.find_spec(package) is None:
        return f"needs {package}: pip install diffloop[{package}]"
    return None
