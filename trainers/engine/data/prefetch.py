"""Copies batches to the device; on CUDA, the next batch is copied during a step."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from typing import Any

import torch

Batch = dict[str, Any]
Finish = Callable[[Batch], Batch]


def to_device(batches: Generator[Batch | Exception], finish: Finish, device: torch.device) -> Generator[Batch]:
    """Yields the batches, finished on the device; raises an error that takes a batch's place; closes `batches`."""
    with closing(batches):
        if device.type == "cuda":
            yield from copied_ahead(batches, CopyStream(finish, device))
            return
        for batch in batches:
            if isinstance(batch, Exception):
                raise batch
            yield finish(_moved(batch, device))


def copied_ahead(batches: Iterator[Batch | Exception], stream: CopyStream) -> Iterator[Batch]:
    """Yields each batch once the copy of the next has begun; an error is raised when its batch is due."""
    held = _begun(batches, stream)
    while held is not None:
        following = _begun(batches, stream)
        if isinstance(held, Exception):
            raise held
        yield stream.finished(*held)
        held = following


def _begun(batches: Iterator[Batch | Exception], stream: CopyStream) -> tuple | Exception | None:
    """Begins to copy the next batch; returns an error that takes its place, or None after the last one."""
    try:
        batch = next(batches, None)
        return stream.begin(batch) if isinstance(batch, dict) else batch
    except Exception as error:
        return error


class CopyStream:
    """A separate CUDA stream for copies to the device."""

    def __init__(self, finish: Finish, device: torch.device) -> None:
        self.finish, self.device = finish, device
        self.stream = torch.cuda.Stream(device)

    def begin(self, batch: Batch) -> tuple[Batch, torch.cuda.Event]:
        """Returns the batch, which is on the device once the event has happened."""
        # a copy is asynchronous from pinned memory only
        pinned = {k: v.pin_memory() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        with torch.cuda.stream(self.stream):
            return self.finish(_moved(pinned, self.device)), self.stream.record_event()

    def finished(self, batch: Batch, copied: torch.cuda.Event) -> Batch:
        """Makes the current stream wait for the copy; the host does not wait."""
        current = torch.cuda.current_stream(self.device)
        current.wait_event(copied)
        for value in batch.values():
            if isinstance(value, torch.Tensor):
                value.record_stream(current)  # otherwise its memory could be reused while the step reads it
        return batch


def _moved(batch: Batch, device: torch.device) -> Batch:
    return {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
