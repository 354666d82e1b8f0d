"""From slots to batches on the device: the epoch's order, the loader, and nothing that has to be saved."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from trainers.engine.clock import Clock
from trainers.engine.messages import is_message
from trainers.engine.options import BaseConfig
from trainers.engine.randomness import example_generator, key_of

Batch = dict[str, Any]
Keys = list[tuple[int, int]]  # (slot, index) of the examples of a batch


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


class SlotExamples(Dataset):
    """Examples by (slot, index), each augmented from a generator of its own; none where `augment` is false.

    Our own messages about the data are returned: torch would wrap a worker's exception in its traceback.
    """

    def __init__(self, examples: Any, seed: int, augment: bool) -> None:
        self.examples = examples
        self.seed = seed
        self.augment = augment and getattr(examples, "random", True)

    def __getitem__(self, key: tuple[int, int]) -> Batch | Exception:
        slot, index = key
        generator = example_generator(self.seed, slot) if self.augment else None
        try:
            return {**self.examples.get(index, generator), "slot": slot}
        except (ValueError, OSError) as error:
            if is_message(error):
                return error
            raise


def collate(examples: list[Batch | Exception]) -> Batch | Exception:
    """Stacks examples to a batch, or passes the first error on."""
    return next((example for example in examples if isinstance(example, Exception)), None) or default_collate(examples)


def training_batches(
    train_set: Any, clock: Clock, base: BaseConfig, process_index: int, device: torch.device
) -> Iterator[Batch]:
    """Yields this process's micro-batches from `clock.origin_step` to the end of the run, on the device."""
    batches = SlotBatches(clock, base.seed, process_index, clock.origin_step)
    return _on_device(_loader(SlotExamples(train_set, base.seed, augment=True), batches, base, device), device)


def validation_batches(
    validation_set: Any, base: BaseConfig, process_index: int, num_processes: int, device: torch.device
) -> Iterator[tuple[Batch, float]]:
    """Yields (batch, weight) of this process's share: batch j goes to process j mod P, nothing is random.

    Every process gets the same number of batches, as collectives in a network's forward need it; what one is short
    of is the first batch again, with weight 0. Slots are indices of the validation set.
    """
    size, total = base.train_batch_size, len(validation_set)
    starts = list(range(0, total, size))
    rounds = -(-len(starts) // num_processes)
    mine = [number * num_processes + process_index for number in range(rounds)]
    weights = [float(number < len(starts)) for number in mine]
    spans = [starts[number] if number < len(starts) else 0 for number in mine]
    keys = [[(i, i) for i in range(start, min(start + size, total))] for start in spans]
    loader = _loader(SlotExamples(validation_set, base.seed, augment=False), keys, base, device)
    return zip(_on_device(loader, device), weights, strict=True)


def _loader(dataset: SlotExamples, batches: Iterable[Keys], base: BaseConfig, device: torch.device) -> DataLoader:
    workers = base.dataloader_num_workers
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        timeout=base.dataloader_timeout if workers else 0,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # else iter() draws from the main generator
        worker_init_fn=_ignore_interrupts,
    )


def _ignore_interrupts(worker_id: int) -> None:
    """Ctrl-C reaches every process of a terminal; the main process decides what happens."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _on_device(loader: Iterable[Batch | Exception], device: torch.device) -> Iterator[Batch]:
    for batch in loader:
        if isinstance(batch, Exception):
            raise batch
        yield {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def first_batch(train_set: Any, clock: Clock, base: BaseConfig, process_index: int, device: torch.device) -> Batch:
    """The micro-batch with which training_batches begins, read in this process."""
    dataset = SlotExamples(train_set, base.seed, augment=True)
    keys = next(iter(SlotBatches(clock, base.seed, process_index, clock.origin_step)))
    return next(_on_device([collate([dataset[key] for key in keys])], device))
