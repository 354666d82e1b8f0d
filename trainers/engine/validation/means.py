"""Means of a task's metrics over a data set that is divided over the processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from datasets_lib.errors import InputError
from trainers.engine.encoders.stages import FrozenEncoders
from trainers.engine.run.randomness import SlotRandom

OfExamples = Callable[[dict[str, Any], SlotRandom], dict[str, Tensor]]  # (batch, rng) -> {name: [B]}


def mean_over(
    encoders: FrozenEncoders,
    batches: Iterable[tuple[dict, float]],
    seed: int,
    measure: OfExamples,
    add_up: Callable[[Tensor], Tensor] = lambda own: own,
) -> dict[str, float]:
    """Means of `measure` over weighted batches, with the same noise every time; `add_up` sums over processes."""
    sums: dict[str, Tensor] = {}
    count = torch.zeros((), device=encoders.device)
    for batch, weight in batches:
        rng = SlotRandom(seed, batch["slot"], "validation")
        for name, values in measure(encoders.encode(batch), rng).items():
            if values.shape != batch["slot"].shape:
                size = len(batch["slot"])
                raise InputError(
                    f"the metric {name} has the shape {list(values.shape)}; it must be [{size}], a number for each "
                    f"example: name the numbers of a vector one by one, such as {name}/0"
                )
            sums[name] = sums.get(name, torch.zeros_like(count)) + weight * values.float().sum()
        count += weight * len(batch["slot"])
    totals = add_up(torch.stack([*sums.values(), count])).tolist()
    return {name: total / totals[-1] for name, total in zip(sums, totals, strict=False)}
