"""Draws a trainer's pictures in batches, divided over the processes; the division changes none of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor

from datasets_lib.errors import InputError
from datasets_lib.example import DataSet
from trainers.base import Trainer
from trainers.engine.run.randomness import SlotRandom


@contextmanager
def evaluation_mode(trainer: Trainer, progress: Callable[[Iterable], Iterable] = iter) -> Iterator[None]:
    """Inside the block networks are in eval mode, uncompiled and without gradients; `trainer.training` is False."""
    modes = [(module, module.training) for network in trainer.modules.values() for module in network.modules()]
    trainer.training, trainer.progress = False, progress
    try:
        for network in trainer.modules.values():
            network.eval()
        compiled = any(module._compiled_call_impl is not None for module, _ in modes)
        with torch.no_grad(), torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield
    finally:
        trainer.training, trainer.progress = True, iter
        for module, mode in modes:
            module.training = mode


def draw(
    trainer: Trainer,
    requests: list[dict],
    numbers: list[int],
    seed: int,
    batch_size: int,
    held_out: DataSet | None = None,
) -> dict[str, list[Tensor]]:
    """Draws requests in batches [B, C, H, W] in [0, 1] on the CPU, by name; the batch size changes no picture."""
    batches: dict[str, list[Tensor]] = {}
    for first in range(0, len(numbers), batch_size):
        chosen = numbers[first : first + batch_size]
        slots = torch.tensor(chosen, device=trainer.device)
        asked = with_examples([requests[number] for number in chosen], held_out)
        drawn = trainer.sample(asked, SlotRandom(seed, slots, "sample"))
        for name, images in drawn.items():
            if images.ndim != 4 or len(images) != len(chosen):
                found = f"sample() of {type(trainer).__name__} returned {name} of shape {list(images.shape)}"
                raise InputError(f"{found}; it must be [{len(chosen)}, C, H, W], a picture for each request")
            batches.setdefault(name, []).append(images.cpu())
    return batches


def with_examples(requests: list[dict], held_out: DataSet | None) -> list[dict]:
    """Adds to requests the columns of the held-out examples that they name."""
    if held_out is None:
        return requests
    return [held_out.get(r["example"], None) | r if "example" in r else r for r in requests]


def evaluation_requests(trainer: Trainer, count: int, held_out: DataSet | None) -> list[dict]:
    """Returns the task's requests for metrics of many pictures, each marked as part of an evaluation."""
    return [request | {"evaluation": True} for request in trainer.evaluation_requests(count, held_out)]


def own_share(count: int, accelerator: Accelerator) -> list[int]:
    """Returns this process's numbers, equally many on every process: number 0 fills the gap."""
    share = math.ceil(count / accelerator.num_processes)
    first = share * accelerator.process_index
    return [number if number < count else 0 for number in range(first, first + share)]


def gather(accelerator: Accelerator, rows: Tensor, count: int) -> Tensor:
    """Gathers rows of own_share in the order of their numbers, [count, ...] on the CPU. Collective."""
    return accelerator.gather(rows.to(accelerator.device).contiguous())[:count].cpu()


def draw_samples(
    accelerator: Accelerator, trainer: Trainer, requests: list[dict], seed: int, held_out: DataSet | None
) -> dict[str, Tensor]:
    """Draws all requests, [N, C, H, W] in [0, 1] by name; each process draws its share. Collective."""
    numbers = own_share(len(requests), accelerator)
    drawn = draw(trainer, requests, numbers, seed, trainer.sample_batch_size or max(1, len(numbers)), held_out)
    return {name: gather(accelerator, torch.cat(images), len(requests)) for name, images in drawn.items()}
