"""Rows drawn at random out of the next ones of a reader; what is in it can be read again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from datasets_lib.images.source import digest
from datasets_lib.streaming.place import Place
from datasets_lib.streaming.rows import RawRow


class Waiting(NamedTuple):
    """A row in the buffer; its number is how many the buffer had taken before it."""

    number: int
    place: Place
    row: RawRow


class ShuffleBuffer:
    """Yields rows in another order: each is drawn from `size` of them, and the next one takes its place.

    The draws are a function of the seed, the number of the rows' reader and their own number.
    """

    def __init__(self, rows: Iterator[tuple[Place, RawRow]], size: int, seed: int, reader: int, drawn: int = 0) -> None:
        self.rows, self.size, self.seed, self.reader, self.drawn = rows, size, seed, reader, drawn
        self.waiting: list[Waiting] = []
        self.taken = 0

    def __iter__(self) -> Iterator[RawRow]:
        while True:
            while len(self.waiting) < self.size:
                self._take()
            number = int(digest(self.seed, "shuffle buffer", self.reader, self.drawn), 16) % len(self.waiting)
            self.drawn += 1
            self.waiting[number], self.waiting[-1] = self.waiting[-1], self.waiting[number]
            yield self.waiting.pop().row

    def _take(self) -> None:
        self.waiting.append(Waiting(self.taken, *next(self.rows)))
        self.taken += 1

    def state(self, following: Place) -> dict[str, Any]:
        """Return where to begin to read what is in the buffer, and which of the rows from there it is, in its order.

        An empty one begins at the place of the following row.
        """
        oldest = min(self.waiting, key=lambda waiting: waiting.number, default=None)
        if oldest is None:
            return {"drawn": self.drawn, "since": following, "rows": 0, "kept": []}
        kept = [waiting.number - oldest.number for waiting in self.waiting]
        return {"drawn": self.drawn, "since": oldest.place, "rows": self.taken - oldest.number, "kept": kept}

    def put_back(self, rows: list[tuple[Place, RawRow]], state: dict[str, Any]) -> None:
        """Fill an empty buffer with the rows that a state says are kept, in their order."""
        self.waiting = [Waiting(number, *row) for number, row in zip(state["kept"], rows, strict=True)]
        self.taken = state["rows"]
