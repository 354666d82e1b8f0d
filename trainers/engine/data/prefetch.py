"""From the host to the device; on CUDA the next batch is copied while a step computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import torch

Batch = dict[str, Any]
Finish = Callable[[Batch], Batch]


def to_device(batches: Iterator[Batch | Exception], finish: Finish, device: torch.device) -> Iterator[Batch]:
    """Yields the batches on the device, finished there; raises the error that comes instead of one, and closes them."""
    with closing(batches):
        if device.type == "cuda":
            yield from copied_ahead(batches, CopyStream(finish, device))
            return
        for batch in batches:
            if isinstance(batch, Exception):
                raise batch
            yield finish(_moved(batch, device))


def copied_ahead(batches: Iterator[Batch | Exception], stream: CopyStream) -> Iterator[Batch]:
    """Yields each batch after the copy of the next one has begun; an error is raised in its batch's turn."""
    held = _begun(batches, stream)
    while held is not None:
        following = _begun(batches, stream)
        if isinstance(held, Exception):
            raise held
        yield stream.finished(*held)
        held = following


def _begun(batches: Iterator[Batch | Exception], stream: CopyStream) -> tuple | Exception | None:
    """What the copy of the next batch gives, an error instead of it, None after the last one."""
    try:
        batch = next(batches, None)
        return stream.begin(batch) if isinstance(batch, dict) else batch
    except Exception as error:
        return error


class CopyStream:
    """A stream of its own for copies to a CUDA device."""

    def __init__(self, finish: Finish, device: torch.device) -> None:
        self.finish, self.device = finish, device
        self.stream = torch.cuda.Stream(device)

    def begin(self, batch: Batch) -> tuple[Batch, torch.cuda.Event]:
        """The batch, on the device as soon as the event is over."""
        # only from pinned memory does a copy run beside the rest
        pinned = {k: v.pin_memory() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        with torch.cuda.stream(self.stream):
            return self.finish(_moved(pinned, self.device)), self.stream.record_event()

    def finished(self, batch: Batch, copied: torch.cuda.Event) -> Batch:
        """The batch, for the current stream, which waits for the copy; the host does not."""
        current = torch.cuda.current_stream(self.device)
        current.wait_event(copied)
        for value in batch.values():
            if isinstance(value, torch.Tensor):
                value.record_stream(current)  # else its memory could be given away while the step reads it
        return batch


def _moved(batch: Batch, device: torch.device) -> Batch:
    return {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
