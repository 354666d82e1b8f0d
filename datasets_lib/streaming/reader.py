"""The rows of one reader of a stream: its share of the shards in every epoch, its place, and what it could not read."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from datasets_lib.errors import InputError
from datasets_lib.foreign import shown
from datasets_lib.streaming.order import Place, ShardOrder
from datasets_lib.streaming.raw_row import RawRow
from datasets_lib.streaming.rows import read_rows
from datasets_lib.streaming.shards import Shard

RETRY_SECONDS = 0.5  # before the first retry; each further one waits twice as long

PlacedRow = tuple[Place, RawRow]


class StreamReader:
    """Reads the shards that the order gives reader `number` of `count`, epoch after epoch without end.

    Iterating yields each row with its place; `place` is then that of the row after it. A shard that cannot be read is
    tried again, then skipped, with a warning; ValueError if an epoch gave no row at all.
    """

    last_error = ""

    def __init__(
        self,
        order: ShardOrder,
        columns: list[str],
        retries: int,
        origin: str,
        number: int,
        count: int,
        position: dict[str, Any],
    ) -> None:
        self.order, self.columns, self.retries, self.origin = order, columns, retries, origin
        self.number, self.count = number, count
        self.place = Place(*position.get("place", ()))  # of the row that is read next
        self.lost_shards, self.rows_read = position.get("lost_shards", 0), position.get("rows_read", 0)
        self.seconds = position.get("seconds", 0.0)
        self.rows = self._from_place_on()

    def __iter__(self) -> Iterator[PlacedRow]:
        return self

    def __next__(self) -> PlacedRow:
        return next(self.rows)

    def read_again(self, since: Place, count: int, kept: Sequence[int]) -> list[PlacedRow] | None:
        """Return those numbered `kept` of the last `count` rows before `place`, which start at `since`.

        None if the rows have changed: a shard may be readable now and not have been then, or the other way round.
        Place and counts stay as they are.
        """
        end, rows_read, lost = self.place, self.rows_read, self.lost_shards
        first = rows_read - count
        self.place, self.rows_read = since, first
        found, wanted = {}, set(kept)
        while self.place < end:
            row = next(self.rows)
            if (number := self.rows_read - first - 1) in wanted:
                found[number] = row
        same = (self.place, self.rows_read) == (end, rows_read)
        self.place, self.rows_read, self.lost_shards = end, rows_read, lost  # what is lost again was counted
        if same:
            return [found[number] for number in kept]
        self.rows = self._from_place_on()
        return None

    def _from_place_on(self) -> Iterator[PlacedRow]:
        while True:
            epoch, first, _ = self.place
            whole, before = self.place == Place(epoch), self.rows_read
            shards = self.order.of_reader(epoch, self.number, self.count)
            for number in range(first, len(shards)):
                yield from self._of_shard(shards[number])
                self.place = Place(epoch, number + 1)
            if whole and self.rows_read == before:
                raise InputError(
                    f"none of the {len(shards)} shards of reader {self.number} of {self.origin} gave an example; "
                    f"{self.last_error or 'they are empty'}"
                )
            self.place = Place(epoch + 1)

    def _of_shard(self, shard: Shard) -> Iterator[PlacedRow]:
        failures = 0
        while failures <= self.retries:
            if failures:
                time.sleep(RETRY_SECONDS * 2 ** (failures - 1))
            try:
                for row in self._timed(read_rows(shard, self.place.offset, self.columns)):
                    failures, place = 0, self.place
                    self.place = place._replace(offset=row.following)
                    self.rows_read += 1
                    yield place, row
                return
            except Exception as error:  # every format and file system has its own
                self.last_error = f"{shown(shard.name)}: {shard.without_secrets(error)}"
                failures += 1
        self.lost_shards += 1
        unit = "row" if shard.kind == ".parquet" else "byte"
        where = f"from {unit} {self.place.offset:,} on" if self.place.offset else "as a whole"
        print(f"WARNING: {self.last_error}: the shard is skipped {where}", flush=True)

    def _timed(self, rows: Iterator[RawRow]) -> Iterator[RawRow]:
        """The rows; adds up the seconds that reading them takes."""
        while True:
            began = time.perf_counter()
            row = next(rows, None)
            self.seconds += time.perf_counter() - began
            if row is None:
                return
            yield row
