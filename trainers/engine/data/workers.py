"""Reads examples ahead in worker processes, and copes with the death of one."""

from __future__ import annotations

import itertools
import multiprocessing
import multiprocessing.connection
import os
import signal
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from enum import Enum, auto
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from datasets_lib.errors import FileError, UserError
from datasets_lib.example import ImageData
from trainers.engine.config.base_options import BaseConfig
from trainers.engine.data.prefetch import Batch
from trainers.engine.run.randomness import example_generator
from trainers.engine.run.signals import EXIT_CODES, FAULT, StopSignals

Keys = list[tuple[int, int]]  # (slot, index) of the examples of a batch
CHECK_SECONDS = 2.0  # between checks whether the workers are alive


class NoBatch(Enum):
    """Why there is no next batch."""

    END = auto()  # that was the last one
    DEAD = auto()  # a worker died


class SlotExamples(Dataset):
    """Examples by (slot, index), each augmented with its own generator if `augment` is true.

    Errors that are messages to the user are returned: torch would add a traceback to a worker's exception. A data set
    that is `in_memory` makes whole batches: `get_batch` on the host, `finish` on the device.
    """

    def __init__(self, examples: ImageData, seed: int, augment: bool) -> None:
        self.examples = examples
        self.seed = seed
        self.augment = augment and examples.random
        self.in_memory = examples.in_memory

    def batch(self, keys: Keys) -> Batch | Exception:
        """Makes the batch of these keys, on the host and for `finish`."""
        if not self.in_memory:
            return collate([self[key] for key in keys])
        generators = [self._generator(slot) for slot, _ in keys]
        batch = self.examples.get_batch([index for _, index in keys], generators)
        return {**batch, "slot": torch.tensor([slot for slot, _ in keys])}

    def finish(self, batch: Batch) -> Batch:
        """Completes a batch that is on the device."""
        return self.examples.finish(batch) if self.in_memory else batch

    def _generator(self, slot: int) -> torch.Generator | None:
        return example_generator(self.seed, slot) if self.augment else None

    def __getitem__(self, key: tuple[int, int]) -> Batch | Exception:
        slot, index = key
        try:
            return {**self.examples.get(index, self._generator(slot)), "slot": slot}
        except UserError as error:
            return error


def collate(examples: list[Batch | Exception]) -> Batch | Exception:
    """Stacks examples into a batch, or returns the first error among them."""
    return next((example for example in examples if isinstance(example, Exception)), None) or default_collate(examples)


def load_ahead(
    dataset: SlotExamples, batches: Iterable[Keys], base: BaseConfig, device: torch.device, stop: StopSignals
) -> Generator[Batch | Exception]:
    """Yields the batches of these keys, read by workers that end with the generator; data in memory needs none."""
    if base.dataloader_num_workers == 0 or dataset.in_memory:
        yield from map(dataset.batch, batches)
        return
    source = {"dataset": dataset, "batch_sampler": batches, "collate_fn": collate}
    yield from from_workers(
        source, lambda number: map(dataset.batch, itertools.islice(batches, number, None)), base, device, stop
    )


def from_workers(
    source: dict[str, Any],
    rest: Callable[[int], Iterable[Batch | Exception]],
    base: BaseConfig,
    device: torch.device,
    stop: StopSignals,
) -> Generator[Batch | Exception]:
    """Yields the batches of a DataLoader; if a worker dies, reads `rest(number)` here and requests a stop."""
    others: set[BaseProcess] = set(multiprocessing.active_children())
    before = signal.getsignal(signal.SIGCHLD)
    loader = DataLoader(
        **source,
        num_workers=base.dataloader_num_workers,
        timeout=min(CHECK_SECONDS, base.dataloader_timeout),
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # otherwise iter() draws from the main generator
        worker_init_fn=_ignore_signals,
    )
    loaded = iter(loader)
    if signal.getsignal(signal.SIGCHLD) != before:
        signal.signal(signal.SIGCHLD, before)  # torch's handler would raise in the middle of a step
    workers: set[BaseProcess] = set(multiprocessing.active_children()) - others
    try:
        for number in itertools.count():
            batch = _next_of(loaded, workers, base.dataloader_timeout)
            if batch is NoBatch.END:
                return
            if batch is NoBatch.DEAD:
                stop.ask(FAULT, _death_of(workers))
                yield from rest(number)
                return
            yield batch
    finally:
        del loaded  # ends the workers that respond
        for worker in workers:  # one that hangs ignores TERM, and Python would wait for it at exit
            worker.kill()


def _next_of(
    loaded: Iterator[Batch | Exception], workers: set[BaseProcess], timeout_seconds: float
) -> Batch | Exception | NoBatch:
    """Waits for the next batch; raises OSError if none comes in time."""
    began = time.monotonic()
    while time.monotonic() - began < timeout_seconds:
        try:
            return next(loaded, NoBatch.END)
        except RuntimeError as error:
            if not all(worker.is_alive() for worker in workers):
                return NoBatch.DEAD
            if not str(error).startswith("DataLoader timed out"):
                raise
        except (OSError, EOFError):  # a worker died while it sent a tensor, and may still be listed as alive
            ended = multiprocessing.connection.wait([worker.sentinel for worker in workers], CHECK_SECONDS)
            for worker in workers:
                if worker.sentinel in ended:
                    worker.join(CHECK_SECONDS)  # a process closes its files before it exits
            if all(worker.is_alive() for worker in workers):
                raise
            return NoBatch.DEAD
    raise FileError(
        f"no batch came from the {len(workers)} data workers in base.dataloader_timeout = {timeout_seconds:g} seconds; "
        "look at the disk that holds the data, or raise it"
    )


def _death_of(workers: set[BaseProcess]) -> str:
    dead = [f"pid {worker.pid} with exit code {worker.exitcode}" for worker in workers if not worker.is_alive()]
    return (
        f"a data worker of process {os.environ.get('RANK', 0)} died ({', '.join(dead)}); -9 is usually a lack of "
        "memory: lower base.dataloader_num_workers or base.image_cache_mb"
    )


def _ignore_signals(worker_id: int) -> None:
    """Leaves the reaction to the training process: a terminal or a scheduler signals every process of a job."""
    for number in EXIT_CODES:
        signal.signal(number, signal.SIG_IGN)
