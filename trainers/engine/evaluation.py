"""Validation on every rank: metrics on held-out examples and pictures of fixed noise, with raw and averaged weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from trainers.base import Trainer
from trainers.engine.ema import EMA
from trainers.engine.encoding import FrozenStages
from trainers.engine.feeding import validation_batches
from trainers.engine.options import BaseConfig
from trainers.engine.randomness import SlotRandom
from trainers.engine.reporting import passing_bar

VISIBLE_SIZE = 64  # pixels; smaller pictures are enlarged in grids by a whole factor


@contextmanager
def evaluation_mode(trainer: Trainer) -> Iterator[None]:
    """Networks in eval mode without gradients and `trainer.training` False inside; as they were after it."""
    modes = [(module, module.training) for network in trainer.modules.values() for module in network.modules()]
    trainer.training = False
    try:
        for network in trainer.modules.values():
            network.eval()
        with torch.no_grad():
            yield
    finally:
        trainer.training = True
        for module, mode in modes:
            module.training = mode


def validate(
    accelerator: Accelerator,
    trainer: Trainer,
    ema: EMA | None,
    stages: FrozenStages,
    validation_set: Any | None,
    base: BaseConfig,
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Returns metrics by name ("valid/loss", with averaged weights "valid_ema/loss") and grids [C, H, W] by name.

    Left of a grid are the raw weights' pictures, right the averaged ones'. Collective.
    """
    weights = {"valid": nullcontext()} | ({"valid_ema": ema.applied()} if ema is not None else {})
    metrics, pictures = {}, []
    with evaluation_mode(trainer):
        for prefix, applied in weights.items():
            with applied:
                if validation_set is not None:
                    found = validation_metrics(accelerator, trainer, stages, validation_set, base)
                    metrics |= {f"{prefix}/{name}": value for name, value in found.items()}
                pictures.append(draw_samples(accelerator, trainer, validation_set, base.seed))
    return metrics, {name: _side_by_side([images[name] for images in pictures]) for name in pictures[0]}


def validation_metrics(
    accelerator: Accelerator, trainer: Trainer, stages: FrozenStages, validation_set: Any, base: BaseConfig
) -> dict[str, float]:
    """Means over the validation set, with the same noise every time. Collective."""
    sums: dict[str, Tensor] = {}
    count = torch.zeros((), device=accelerator.device)
    rank, world = accelerator.process_index, accelerator.num_processes
    share = validation_batches(validation_set, base, rank, world, accelerator.device)
    for batch, weight in passing_bar(accelerator, "validating")(share):
        rng = SlotRandom(base.seed, batch["slot"], "validation")
        for name, values in trainer.validation_metrics(stages.encode(batch), rng).items():
            sums[name] = sums.get(name, 0) + weight * values.float().sum()
        count += weight * len(batch["slot"])
    totals = accelerator.reduce(torch.stack([*sums.values(), count]), "sum").tolist()
    return {name: total / totals[-1] for name, total in zip(sums, totals, strict=False)}


def draw_samples(accelerator: Accelerator, trainer: Trainer, validation_set: Any, seed: int) -> dict[str, Tensor]:
    """Pictures [N, C, H, W] in [0, 1] of all requests by name, dealt out over the ranks and gathered. Collective."""
    requests = trainer.sample_requests(validation_set)
    share = math.ceil(len(requests) / accelerator.num_processes)
    first = share * accelerator.process_index
    mine = [number if number < len(requests) else 0 for number in range(first, first + share)]
    slots = torch.tensor(mine, device=accelerator.device)
    drawn = trainer.sample([requests[number] for number in mine], SlotRandom(seed, slots, "sample"))
    for name, images in drawn.items():
        if images.ndim != 4 or len(images) != share:
            found = f"sample() of {type(trainer).__name__} returned {name} of shape {list(images.shape)}"
            raise ValueError(f"{found}; it must be [{share}, C, H, W], a picture for each request")
    return {name: accelerator.gather(images.contiguous())[: len(requests)].cpu() for name, images in drawn.items()}


def _side_by_side(pictures: list[Tensor]) -> Tensor:
    """Grids of several sets of pictures [N, C, H, W], next to each other with a white gap."""
    from torchvision.utils import make_grid

    columns = math.ceil(math.sqrt(len(pictures[0])))
    zoom = max(1, VISIBLE_SIZE // pictures[0].shape[-1])
    enlarged = [images.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3) for images in pictures]
    grids = [make_grid(images, nrow=columns, padding=2, pad_value=1.0) for images in enlarged]
    gap = torch.ones(grids[0].shape[0], grids[0].shape[1], 8)
    parts = [part for grid in grids for part in (gap, grid)]
    return torch.cat(parts[1:], dim=2)
