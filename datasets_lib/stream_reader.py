"""One reader of a stream: its share of the shards in every epoch, the place where it is, and what it could not read."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from datasets_lib.images import ImageError
from datasets_lib.place import Place
from datasets_lib.shard_rows import RawRow, read_rows
from datasets_lib.shards import Shard
from datasets_lib.shuffle_buffer import ShuffleBuffer

if TYPE_CHECKING:
    import torch

    from datasets_lib.stream import Stream

RETRY_SECONDS = 0.5  # before the first retry; each further one waits twice as long
FEW_BAD = 10  # pictures that may be passed over before their part counts


class StreamReader:
    """Reads the shards number, number + count, ... of every epoch, one epoch after the other without an end.

    A shard that cannot be read is tried again, then left, with a warning; ValueError where that was all of an epoch.
    """

    def __init__(self, stream: Stream, number: int, count: int, position: dict[str, Any] | None = None) -> None:
        self.stream, self.number, self.count = stream, number, count
        position = position or {}
        self.place = Place(*position.get("place", ()))  # of the row that is read next
        self.lost_shards, self.bad_images = position.get("lost_shards", 0), position.get("bad_images", 0)
        self.rows_read, self.seconds = position.get("rows_read", 0), position.get("seconds", 0.0)
        self.last_error = ""
        size = stream.args.shuffle_buffer_size
        self.buffer = ShuffleBuffer(self, size, position.get("buffer")) if size else None
        self.source = iter(self.buffer) if self.buffer else (row for _, row in self.rows())

    def next(self, generator: torch.Generator | None) -> dict[str, Any]:
        """Return the next example; a broken picture is passed over and counted with `bad_images: skip`."""
        while True:
            row = next(self.source)
            try:
                return self.stream.example(row, generator)
            except ImageError as error:
                if not self.stream.skips_images:
                    raise
                self._pass_over(error)

    def _pass_over(self, error: ImageError) -> None:
        self.bad_images += 1
        print(f"WARNING: {error}: passed over", flush=True)
        if self.bad_images > max(FEW_BAD, self.rows_read // 10):
            raise ValueError(
                f"{self.bad_images} of {self.rows_read} images cannot be read, and base.bad_images=skip passes over 10 "
                f"% at most; the last: {error}"
            ) from error

    def position(self) -> dict[str, Any]:
        """Return what a reader needs to go on after the last example."""
        found = {"place": self.place, "lost_shards": self.lost_shards, "bad_images": self.bad_images}
        found |= {"rows_read": self.rows_read, "seconds": round(self.seconds, 3)}
        return found | ({"buffer": self.buffer.state()} if self.buffer else {})

    def rows(self) -> Iterator[tuple[Place, RawRow]]:
        """Yield (place, row) from the place on; `self.place` is then that of the row after it."""
        while True:
            epoch, first, _ = self.place
            whole, before = self.place == Place(epoch), self.rows_read
            shards = self.stream.order.of_reader(epoch, self.number, self.count)
            for number in range(first, len(shards)):
                yield from self._of_shard(shards[number])
                self.place = Place(epoch, number + 1)
            if whole and self.rows_read == before:
                raise ValueError(
                    f"none of the {len(shards)} shards of reader {self.number} of {self.stream.origin} gave an "
                    f"example; {self.last_error or 'they are empty'}"
                )
            self.place = Place(epoch + 1)

    def _of_shard(self, shard: Shard) -> Iterator[tuple[Place, RawRow]]:
        failures = 0
        while failures <= self.stream.args.shard_retries:
            if failures:
                time.sleep(RETRY_SECONDS * 2 ** (failures - 1))
            try:
                for row in self._timed(read_rows(shard, self.place.offset, self.stream.columns.names)):
                    failures, place = 0, self.place
                    self.place = place._replace(offset=row.following)
                    self.rows_read += 1
                    yield place, row
                return
            except Exception as error:  # every format and file system has its own
                self.last_error = f"{shard.name}: {shard.without_secrets(error)}"
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
