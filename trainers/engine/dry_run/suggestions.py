"""Suggests changes that make a run fit, the cheapest first, among those that its configuration allows."""

from __future__ import annotations

import dataclasses
import errno
from typing import Any, NamedTuple

import torch

from trainers.engine.config.base_options import BaseConfig
from trainers.engine.config.config import RunConfig
from trainers.engine.tracking.console import has_bf16

ALLOCATION_TEXTS = ("DefaultCPUAllocator", "can't allocate memory", "out of memory")
DISK_TEXTS = ("does not fit in", "No space left", "quota exceeded")


class OutOfResources(NamedTuple):
    """Too little memory of the "device" or the "host", or of "disk" space."""

    of: str
    text: str


def out_of_resources(error: Exception) -> OutOfResources | None:
    """Says what an error lacks; None for an error of another kind."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if isinstance(error, torch.OutOfMemoryError):
        return OutOfResources("device", text)
    if (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or (isinstance(error, RuntimeError) and any(each in text for each in ALLOCATION_TEXTS))
    ):
        return OutOfResources("host", text)
    if isinstance(error, OSError) and any(each in text for each in DISK_TEXTS):
        return OutOfResources("disk", text.partition("; older checkpoints")[0])
    return None


class Suggestion(NamedTuple):
    """Options to change, by dotted key, and the effect."""

    changes: dict[str, Any]
    effect: str

    def __str__(self) -> str:
        return " ".join(f"{key}={value}" for key, value in self.changes.items()) + f"  {self.effect}"


def memory_suggestions(run: RunConfig, phase: str, device: torch.device) -> list[Suggestion]:
    """Suggestions for a run that ran out of memory in a phase."""
    base, task = run.base, run.task
    found: list[Suggestion] = []
    if phase in ("validation", "evaluation") and run.config.valid_batch_size > 1:
        fewer = run.config.valid_batch_size // 2
        found.append(Suggestion({f"{task}.valid_batch_size": fewer}, "half the pictures at once"))
    found += [
        Suggestion({f"{task}.cache_latents": "disk"}, "pictures are encoded once, and the encoder leaves the device"),
        Suggestion({f"{task}.cache_text": "disk"}, "captions are encoded once, and the encoder leaves the device"),
    ]
    if base.mixed_precision == "no" and has_bf16(device):
        effect = "activations of 2 bytes instead of 4, computed in hardware"
        found.append(Suggestion({"base.mixed_precision": "bf16"}, effect))
    effect = "activations are computed twice instead of kept; slower steps"
    found += [Suggestion({"base.gradient_checkpointing": "true"}, effect), *_smaller_batches(base)]
    if device.type == "cuda":
        found.append(Suggestion({f"{task}.offload_ema": "true"}, "averages in main memory; a copy in every step"))
    return [suggestion for suggestion in found if _possible(run, suggestion)]


def disk_suggestions(run: RunConfig, disk: dict[str, int] | None) -> list[Suggestion]:
    """Suggestions for a run whose files do not fit; the sizes of a finished dry run give the number that fits."""
    found = []
    if disk is not None:
        checkpoint = disk["checkpoint"]
        others = disk["needed"] - disk["at_once"] * checkpoint
        fitting = (disk["free"] - others) // checkpoint - 1  # an old one is removed after the new one is complete
        if 1 <= fitting < disk["kept"]:
            saved = (disk["kept"] - fitting) * checkpoint
            return [Suggestion({"base.checkpoints_total_limit": fitting}, f"{saved:,} bytes less")]
    if run.base.checkpoints_total_limit is None:
        found.append(Suggestion({"base.checkpoints_total_limit": 1}, "only the newest checkpoint is kept"))
    return [*found, Suggestion({"base.output_dir": "FOLDER"}, "one on another disk")]


def _smaller_batches(base: BaseConfig) -> list[Suggestion]:
    """Divides the batch by its smallest divisor; the global batch, and so the training, stays the same."""
    size = base.train_batch_size
    divisor = next((number for number in range(2, size + 1) if size % number == 0), None)
    if divisor is None:
        return []
    changes = {"base.train_batch_size": size // divisor}
    if base.global_batch_size is None:
        changes["base.gradient_accumulation_steps"] = (base.gradient_accumulation_steps or 1) * divisor
    return [Suggestion(changes, f"1/{divisor} of the examples at once, the same global batch; slower steps")]


def _possible(run: RunConfig, suggestion: Suggestion) -> bool:
    """Whether each option exists and has another value now, and the changed configuration has no problem."""
    base, config = run.base, run.config
    for key, value in suggestion.changes.items():
        section, _, option = key.partition(".")
        value = {"true": True}.get(value, value)
        now = getattr(base if section == "base" else config, option, value)
        if now == value or (option.startswith("cache_") and now is not None):
            return False
        if section == "base":
            base = dataclasses.replace(base, **{option: value})
        else:
            config = dataclasses.replace(config, **{option: value})
    return not any((*base.problems(), *config.problems(base)))
