"""Rows drawn at random out of the next ones of a reader; what is in it can be read again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from datasets_lib.place import Place
from datasets_lib.shard_rows import RawRow
from datasets_lib.source import digest

if TYPE_CHECKING:
    from datasets_lib.stream_reader import StreamReader


class Waiting(NamedTuple):
    """A row in the buffer, and how many rows its reader had read with it."""

    number: int
    place: Place
    row: RawRow


class ShuffleBuffer:
    """Yields a reader's rows in another order: each is drawn from `size` of them, and the next one takes its place.

    The draws are a function of the seed, the reader and their number.
    """

    def __init__(self, reader: StreamReader, size: int, state: dict[str, Any] | None) -> None:
        self.reader, self.size = reader, size
        self.rows = reader.rows()
        self.waiting: list[Waiting] = []
        self.drawn = state["drawn"] if state else 0
        if state and reader.stream.args.shuffle_buffer_resume == "replay":
            self._replay(state)

    def __iter__(self) -> Iterator[RawRow]:
        reader = self.reader
        while True:
            while len(self.waiting) < self.size:
                self._read()
            key = digest(reader.stream.args.seed, "shuffle buffer", reader.number, self.drawn)
            number = int(key, 16) % len(self.waiting)
            self.drawn += 1
            self.waiting[number], self.waiting[-1] = self.waiting[-1], self.waiting[number]
            yield self.waiting.pop().row

    def _read(self) -> None:
        place, row = next(self.rows)
        self.waiting.append(Waiting(self.reader.rows_read, place, row))

    def state(self) -> dict[str, Any]:
        """Return where to begin to read what is in the buffer, and which of the rows from there it is, in its order."""
        oldest = min(self.waiting, key=lambda waiting: waiting.number, default=None)
        if oldest is None:
            return {"drawn": self.drawn, "since": self.reader.place, "rows": 0, "kept": []}
        kept = [waiting.number - oldest.number for waiting in self.waiting]
        rows = self.reader.rows_read - oldest.number + 1
        return {"drawn": self.drawn, "since": oldest.place, "rows": rows, "kept": kept}

    def _replay(self, state: dict[str, Any]) -> None:
        """Reads again what was in the buffer, up to where the reader was; leaves it empty where that is not the same.

        A shard may be readable now and not have been then, or the other way round.
        """
        reader, end, count, lost = self.reader, self.reader.place, self.reader.rows_read, self.reader.lost_shards
        first = count - state["rows"] + 1
        reader.place, reader.rows_read = Place(*state["since"]), first - 1
        order = {first + kept: place for place, kept in enumerate(state["kept"])}
        while reader.place < end:
            self._read()
            if self.waiting[-1].number not in order:
                self.waiting.pop()
        if (reader.place, reader.rows_read) == (end, count):
            self.waiting.sort(key=lambda waiting: order[waiting.number])
        else:
            print(
                f"WARNING: what was in the shuffle buffer of reader {reader.number} reads otherwise now: it begins "
                f"empty, and {len(order):,} examples that were not trained on are left out of this epoch",
                flush=True,
            )
            self.waiting, self.rows = [], reader.rows()
        reader.place, reader.rows_read, reader.lost_shards = end, count, lost  # what is lost again was counted
