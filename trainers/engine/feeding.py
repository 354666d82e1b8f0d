"""From slots to batches on the device: the epoch's order, the loader, and nothing that has to be saved."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

import torch

from trainers.engine.clock import Clock
from trainers.engine.loading import Batch, Keys, SlotExamples, collate, load_ahead
from trainers.engine.options import BaseConfig
from trainers.engine.randomness import key_of
from trainers.engine.stopping import Stopping


class EpochOrder:
    """Which example a slot holds: a permutation of (seed, epoch), every index once per epoch."""

    def __init__(self, num_examples: int, seed: int) -> None:
        self.num_examples = num_examples
        self.seed = seed
        self._permutations: dict[int, torch.Tensor] = {}  # of the two newest epochs: a step may hold slots of both

    def index(self, slot: int) -> int:
        epoch, position = divmod(slot, self.num_examples)
        if epoch not in self._permutations:
            generator = torch.Generator().manual_seed(key_of(self.seed, "order", epoch))
            self._permutations[epoch] = torch.randperm(self.num_examples, generator=generator)
            for old in sorted(self._permutations)[:-2]:
                del self._permutations[old]
        return int(self._permutations[epoch][position])


class SlotBatches:
    """A batch sampler over the rest of the run: the keys of each micro-batch of this process."""

    def __init__(self, clock: Clock, seed: int, process_index: int, start_step: int) -> None:
        self.clock = clock
        self.seed = seed
        self.process_index = process_index
        self.start_step = start_step

    def __iter__(self) -> Iterator[Keys]:
        order = EpochOrder(self.clock.num_examples, self.seed)
        for step in range(self.start_step, self.clock.total_steps):
            for micro_step in range(self.clock.accumulation_steps):
                slots = self.clock.micro_batch_slots(step, micro_step, self.process_index)
                yield [(slot, order.index(slot)) for slot in slots]


def training_batches(
    train_set: Any, clock: Clock, base: BaseConfig, process_index: int, device: torch.device, stopping: Stopping
) -> Iterator[Batch]:
    """Yields this process's micro-batches from `clock.origin_step` to the end of the run, on the device.

    Close it: that ends the workers.
    """
    batches = SlotBatches(clock, base.seed, process_index, clock.origin_step)
    examples = SlotExamples(train_set, base.seed, augment=True)
    return _on_device(load_ahead(examples, batches, base, device, stopping), device)


def examples_once(
    dataset: Any,
    indices: Sequence[int],
    base: BaseConfig,
    process_index: int,
    num_processes: int,
    device: torch.device,
    stopping: Stopping,
) -> Iterator[tuple[Batch, float]]:
    """Yields (batch, weight) of this process's share of some examples: batch j goes to process j mod P.

    Every process gets the same number of batches, as collectives in a network's forward need it; what one is short
    of is the first batch again, with weight 0. Nothing is random; slots are indices of the data set.
    """
    size, total = base.train_batch_size, len(indices)
    starts = list(range(0, total, size))
    rounds = -(-len(starts) // num_processes)
    mine = [number * num_processes + process_index for number in range(rounds)]
    weights = [float(number < len(starts)) for number in mine]
    spans = [starts[number] if number < len(starts) else 0 for number in mine]
    keys = [[(i, i) for i in indices[start : start + size]] for start in spans]
    examples = SlotExamples(dataset, base.seed, augment=False)
    return zip(_on_device(load_ahead(examples, keys, base, device, stopping), device), weights, strict=True)


def _on_device(batches: Iterator[Batch | Exception], device: torch.device) -> Iterator[Batch]:
    with closing(batches):
        for batch in batches:
            if isinstance(batch, Exception):
                raise batch
            yield {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def first_batch(train_set: Any, clock: Clock, base: BaseConfig, process_index: int, device: torch.device) -> Batch:
    """The micro-batch with which training_batches begins, read in this process."""
    dataset = SlotExamples(train_set, base.seed, augment=True)
    keys = next(iter(SlotBatches(clock, base.seed, process_index, clock.origin_step)))
    return next(_on_device(iter([collate([dataset[key] for key in keys])]), device))
