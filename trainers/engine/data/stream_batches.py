"""Batches of a stream: read by its readers in turn, each with the position to go on from when it was trained on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import closing
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.utils.data import IterableDataset, get_worker_info

from trainers.engine.config.base_options import BaseConfig
from trainers.engine.config.errors import is_message
from trainers.engine.data.prefetch import to_device
from trainers.engine.data.workers import Batch, collate, from_workers
from trainers.engine.run.clock import Clock
from trainers.engine.run.randomness import example_generator
from trainers.engine.run.signals import StopSignals

READER = "reader"  # the column with the number and the position of the reader of a batch


class StreamBatches(IterableDataset):
    """The rest of a run's micro-batches of this process; batch n is of the reader (turn + n) mod their number.

    In a worker those of one reader. The k-th example of a batch gets the k-th of its slots.
    """

    def __init__(self, stream: Any, clock: Clock, base: BaseConfig, process_index: int) -> None:
        self.stream, self.clock, self.seed, self.process_index = stream, clock, base.seed, process_index
        self.positions, self.turn = list(stream.readers), stream.turn  # after the last batch that left its worker
        self.count = (clock.total_steps - clock.origin_step) * clock.accumulation_steps

    def __iter__(self) -> Iterator[Batch | Exception]:
        worker = get_worker_info()
        return self.read(range(self.count) if worker is None else range(worker.id, self.count, worker.num_workers))

    def read(self, numbers: Iterable[int]) -> Iterator[Batch | Exception]:
        """Yields the batches of these numbers, or the first error that is a message."""
        readers: dict[int, Any] = {}
        for number in numbers:
            place = (self.turn + number) % len(self.positions)
            try:
                if place not in readers:
                    readers[place] = self.stream.open_reader(place, self.positions[place])
                yield self._batch(readers[place], number) | {READER: json.dumps([place, readers[place].position()])}
            except (ValueError, OSError) as error:
                if not is_message(error):
                    raise
                yield error

    def _batch(self, reader: Any, number: int) -> Batch:
        step, micro_step = divmod(number, self.clock.accumulation_steps)
        slots = self.clock.micro_batch_slots(self.clock.origin_step + step, micro_step, self.process_index)
        return collate([{**reader.next(example_generator(self.seed, slot)), "slot": slot} for slot in slots])

    def _rest(self, number: int) -> Iterator[Batch | Exception]:
        return self.read(range(number, self.count))

    def read_ahead(self, base: BaseConfig, device: torch.device, stop: StopSignals) -> Iterator[Batch | Exception]:
        """Yields all batches, read in worker processes where there are any."""
        source = {"dataset": self, "batch_size": None, "collate_fn": as_it_is}
        batches = from_workers(source, self._rest, base, device, stop) if base.dataloader_num_workers else iter(self)
        with closing(batches):
            for batch in batches:
                if not isinstance(batch, Exception):
                    batch[READER] = place, position = json.loads(batch[READER])
                    self.positions[place] = position
                yield batch


def as_it_is(batch: Batch | Exception) -> Batch | Exception:
    return batch


def stream_batches(
    stream: Any, clock: Clock, base: BaseConfig, process_index: int, device: torch.device, stop: StopSignals
) -> Iterator[Batch]:
    """Yields this process's micro-batches on the device, and notes in the stream what was handed out for training."""
    batches = StreamBatches(stream, clock, base, process_index)
    with closing(to_device(batches.read_ahead(base, device, stop), as_it_is, device)) as on_device:
        for batch in on_device:
            place, position = batch.pop(READER)
            stream.readers = (*stream.readers[:place], position, *stream.readers[place + 1 :])
            stream.turn = (place + 1) % len(stream.readers)
            yield batch


def first_of_stream(stream: Any, clock: Clock, base: BaseConfig, process_index: int, device: torch.device) -> Batch:
    """The micro-batch with which stream_batches begins, read in this process; nothing is noted."""
    batch = next(to_device(StreamBatches(stream, clock, base, process_index).read([0]), as_it_is, device))
    return {name: value for name, value in batch.items() if name != READER}


def positions(stream: Any) -> list[dict[str, Any]]:
    """Where the readers of every process are after the last batch that was trained on. Collective."""
    return gather_object([{"turn": stream.turn, "readers": stream.readers, "skipped_before": stream.skipped_before}])
