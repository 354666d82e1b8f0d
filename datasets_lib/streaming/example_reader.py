"""The examples of one reader of a stream, drawn from a shuffle buffer if there is one, and its position after each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from datasets_lib.errors import InputError
from datasets_lib.images.decode import ImageError
from datasets_lib.images.source import digest
from datasets_lib.streaming.order import Place
from datasets_lib.streaming.raw_row import RawRow
from datasets_lib.streaming.reader import StreamReader

if TYPE_CHECKING:
    import torch

FEW_BAD = 10  # pictures that may be skipped before their share counts


class ShuffleBuffer:
    """Yields a reader's rows in another order: each is drawn from `size` of them, and the next one takes its place.

    The draws are a function of the seed, the reader's number and their own number.
    """

    def __init__(self, reader: StreamReader, size: int, seed: int, drawn: int) -> None:
        self.reader, self.size, self.seed, self.drawn = reader, size, seed, drawn
        self.waiting: list[tuple[int, Place, RawRow]] = []  # numbered in the order in which they were taken
        self.taken = 0

    def __iter__(self) -> Iterator[RawRow]:
        while True:
            while len(self.waiting) < self.size:
                self.waiting.append((self.taken, *next(self.reader)))
                self.taken += 1
            number = int(digest(self.seed, "shuffle buffer", self.reader.number, self.drawn), 16) % len(self.waiting)
            self.drawn += 1
            self.waiting[number], self.waiting[-1] = self.waiting[-1], self.waiting[number]
            _, _, row = self.waiting.pop()
            yield row

    def state(self) -> dict[str, Any]:
        """Return where to start reading what is in the buffer, and which of the rows from there it is, in its order."""
        oldest, since = self.taken, self.reader.place
        if self.waiting:
            oldest, since, _ = min(self.waiting)  # by number: no two are equal
        kept = [number - oldest for number, _, _ in self.waiting]
        return {"drawn": self.drawn, "since": since, "rows": self.taken - oldest, "kept": kept}

    def refill(self, state: dict[str, Any]) -> None:
        """Read again what was in the buffer; leave it empty, with a warning, if other rows are there now."""
        rows = self.reader.read_again(Place(*state["since"]), state["rows"], state["kept"])
        if rows is None:
            print(
                f"WARNING: the rows in the shuffle buffer of reader {self.reader.number} have changed: it begins "
                f"empty, and {len(state['kept']):,} examples that were not trained on are left out of this epoch",
                flush=True,
            )
            return
        self.waiting = [(number, *row) for number, row in zip(state["kept"], rows, strict=True)]
        self.taken = state["rows"]


class ExampleReader:
    """Makes examples of a reader's rows; with `skips_images` broken pictures are skipped and counted."""

    def __init__(
        self,
        reader: StreamReader,
        buffer: ShuffleBuffer | None,
        make_example: Callable[[RawRow, torch.Generator | None], dict[str, Any]],
        skips_images: bool,
        bad_images: int,
    ) -> None:
        self.reader, self.buffer, self.make_example = reader, buffer, make_example
        self.skips_images, self.bad_images = skips_images, bad_images
        self.rows = (row for _, row in reader) if buffer is None else iter(buffer)

    def next(self, generator: torch.Generator | None) -> dict[str, Any]:
        """Return the next example, whose random decisions draw from the generator."""
        while True:
            row = next(self.rows)
            try:
                return self.make_example(row, generator)
            except ImageError as error:
                if not self.skips_images:
                    raise
                self._skip(error)

    def _skip(self, error: ImageError) -> None:
        self.bad_images += 1
        print(f"WARNING: {error}: skipped", flush=True)
        read = self.reader.rows_read
        if self.bad_images > max(FEW_BAD, read // 10):
            raise InputError(
                f"{self.bad_images} of {read} images cannot be read, and base.bad_images=skip allows 10 % at most; "
                f"the last: {error}"
            ) from error

    def position(self) -> dict[str, Any]:
        """Return what a reader needs to continue after the last example."""
        reader = self.reader
        found = {"place": reader.place, "lost_shards": reader.lost_shards, "bad_images": self.bad_images}
        found |= {"rows_read": reader.rows_read, "seconds": round(reader.seconds, 3)}
        return found if self.buffer is None else found | {"buffer": self.buffer.state()}
