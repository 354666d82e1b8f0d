"""Batches of a stream, read by its readers in turn; each carries the position from which a resumed run continues."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable
from contextlib import closing
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.utils.data import IterableDataset, default_collate, get_worker_info

from datasets_lib.errors import UserError
from datasets_lib.example import ExampleReader, StreamData
from trainers.engine.config.base_options import BaseConfig
from trainers.engine.data.prefetch import to_device
from trainers.engine.data.workers import Batch, from_workers
from trainers.engine.run.clock import Clock
from trainers.engine.run.randomness import example_generator
from trainers.engine.run.signals import StopSignals

READER = "reader"  # the column with the number and position of a batch's reader


class StreamBatches(IterableDataset):
    """This process's remaining micro-batches; batch n comes from reader (turn + n) mod the number of readers."""

    def __init__(self, stream: StreamData, clock: Clock, base: BaseConfig, process_index: int) -> None:
        self.stream, self.clock, self.seed, self.process_index = stream, clock, base.seed, process_index
        self.positions, self.turn = list(stream.readers), stream.turn  # after the last batch that left its worker
        self.count = (clock.total_steps - clock.origin_step) * clock.accumulation_steps

    def __iter__(self) -> Generator[Batch | Exception]:
        worker = get_worker_info()
        return self.read(range(self.count) if worker is None else range(worker.id, self.count, worker.num_workers))

    def read(self, numbers: Iterable[int]) -> Generator[Batch | Exception]:
        """Yields the batches with these numbers; an error that is a message to the user takes a batch's place."""
        readers: dict[int, ExampleReader] = {}
        for number in numbers:
            place = (self.turn + number) % len(self.positions)
            try:
                if place not in readers:
                    readers[place] = self.stream.open_reader(place, self.positions[place])
                batch = self._batch(readers[place], number)
                yield {**batch, READER: json.dumps([place, readers[place].position()])}
            except UserError as error:
                yield error

    def _batch(self, reader: ExampleReader, number: int) -> Batch:
        step, micro_step = divmod(number, self.clock.accumulation_steps)
        slots = self.clock.micro_batch_slots(self.clock.origin_step + step, micro_step, self.process_index)
        return default_collate([{**reader.next(example_generator(self.seed, slot)), "slot": slot} for slot in slots])

    def read_ahead(self, base: BaseConfig, device: torch.device, stop: StopSignals) -> Generator[Batch | Exception]:
        """Yields all batches, read in worker processes if there are any."""
        batches = iter(self)
        if base.dataloader_num_workers:
            source = {"dataset": self, "batch_size": None, "collate_fn": unchanged}
            batches = from_workers(source, lambda number: self.read(range(number, self.count)), base, device, stop)
        with closing(batches):
            for batch in batches:
                if not isinstance(batch, Exception):
                    batch[READER] = place, position = json.loads(batch[READER])
                    self.positions[place] = position
                yield batch


def unchanged(batch: Batch) -> Batch:
    return batch


def stream_batches(
    stream: StreamData, clock: Clock, base: BaseConfig, process_index: int, device: torch.device, stop: StopSignals
) -> Generator[Batch]:
    """Yields this process's micro-batches on the device, and records in the stream what was handed to the training."""
    batches = StreamBatches(stream, clock, base, process_index)
    with closing(to_device(batches.read_ahead(base, device, stop), unchanged, device)) as on_device:
        for batch in on_device:
            place, position = batch.pop(READER)
            stream.readers = (*stream.readers[:place], position, *stream.readers[place + 1 :])
            stream.turn = (place + 1) % len(stream.readers)
            yield batch


def first_of_stream(
    stream: StreamData, clock: Clock, base: BaseConfig, process_index: int, device: torch.device
) -> Batch:
    """Reads the first micro-batch of stream_batches, in this process; nothing is recorded."""
    batch = next(to_device(StreamBatches(stream, clock, base, process_index).read([0]), unchanged, device))
    return {name: value for name, value in batch.items() if name != READER}


def positions(stream: StreamData) -> list[dict[str, Any]]:
    """Gathers the positions of every process's readers after the last batch trained on. Collective."""
    return gather_object([{"turn": stream.turn, "readers": stream.readers, "skipped_before": stream.skipped_before}])
