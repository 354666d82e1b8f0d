"""Validation on every rank: metrics on held-out examples and pictures of fixed noise, with raw and averaged weights."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from trainers.base import Trainer
from trainers.engine.ema import EMA
from trainers.engine.encoding import FrozenStages
from trainers.engine.feeding import validation_batches
from trainers.engine.randomness import SlotRandom
from trainers.engine.reporting import passing_bar
from trainers.engine.stopping import Abandoned, Stopping
from trainers.engine.tracking import VALIDATION_TIME, Tracking

VISIBLE_SIZE = 64  # pixels; smaller pictures are enlarged in grids by a whole factor


@contextmanager
def evaluation_mode(trainer: Trainer, progress: Callable[[Iterable], Iterable] = iter) -> Iterator[None]:
    """Networks in eval mode without gradients and `trainer.training` False inside; as they were after it."""
    modes = [(module, module.training) for network in trainer.modules.values() for module in network.modules()]
    trainer.training, trainer.progress = False, progress
    try:
        for network in trainer.modules.values():
            network.eval()
        with torch.no_grad():
            yield
    finally:
        trainer.training, trainer.progress = True, iter
        for module, mode in modes:
            module.training = mode


def validate(
    accelerator: Accelerator,
    trainer: Trainer,
    ema: EMA | None,
    stages: FrozenStages,
    validation_set: Any | None,
    stopping: Stopping,
    tracking: Tracking,
    steps_done: int,
) -> None:
    """Logs metrics ("valid/loss", with averaged weights "valid_ema/loss") and grids of pictures. Collective.

    The raw weights' pictures come first, left or above, the averaged ones' second. Where the run is asked to stop, the
    validation is abandoned and nothing of it is logged: a resumed run makes it up.
    """
    weights = {"valid": nullcontext()} | ({"valid_ema": ema.applied()} if ema is not None else {})
    metrics, pictures, began = {}, [], time.perf_counter()
    try:
        if stopping.agreed(wait=True):
            raise Abandoned
        with evaluation_mode(trainer, lambda steps: stopping.watch(passing_bar(accelerator, "sampling")(steps))):
            for prefix, applied in weights.items():
                with applied:
                    if validation_set is not None:
                        found = validation_metrics(accelerator, trainer, stages, validation_set, stopping)
                        metrics |= {f"{prefix}/{name}": value for name, value in found.items()}
                    pictures.append(draw_samples(accelerator, trainer, validation_set, trainer.base.seed))
    except Abandoned:
        accelerator.print(f"The validation at step {steps_done} is abandoned; a resumed run makes it up")
        return
    grids = {name: _grid([images[name] for images in pictures], trainer.grid_columns) for name in pictures[0]}
    tracking.log_grids(grids, steps_done)
    tracking.log(metrics | {VALIDATION_TIME: time.perf_counter() - began}, steps_done)


def validation_metrics(
    accelerator: Accelerator,
    trainer: Trainer,
    stages: FrozenStages,
    validation_set: Any,
    stopping: Stopping,
) -> dict[str, float]:
    """Means over the validation set, with the same noise every time. Collective."""
    sums: dict[str, Tensor] = {}
    count = torch.zeros((), device=accelerator.device)
    rank, world = accelerator.process_index, accelerator.num_processes
    share = validation_batches(validation_set, trainer.base, rank, world, accelerator.device, stopping)
    for batch, weight in stopping.watch(passing_bar(accelerator, "validating")(share)):
        rng = SlotRandom(trainer.base.seed, batch["slot"], "validation")
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


def _grid(pictures: list[Tensor], columns: int | None) -> Tensor:
    """One grid of several sets of pictures [N, C, H, W] with a white gap: below each other where columns are given."""
    from torchvision.utils import make_grid

    below = columns is not None
    columns = columns or math.ceil(math.sqrt(len(pictures[0])))
    zoom = max(1, VISIBLE_SIZE // pictures[0].shape[-1])
    enlarged = [images.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3) for images in pictures]
    grids = [make_grid(images, nrow=columns, padding=2, pad_value=1.0) for images in enlarged]
    channels, height, width = grids[0].shape
    gap = torch.ones(channels, 8, width) if below else torch.ones(channels, height, 8)
    parts = [part for grid in grids for part in (gap, grid)]
    return torch.cat(parts[1:], dim=1 if below else 2)
