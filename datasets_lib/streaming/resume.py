"""Counts what a resumed stream reads again, and what it leaves out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from datasets_lib.streaming.order import Place, ShardOrder
from datasets_lib.streaming.shards import Shard

Readers = list[dict[str, Any]]  # what a checkpoint has of the readers of all processes, in order


def saved_readers(saved: list[dict[str, Any]]) -> Readers:
    """Return the readers of all processes; one that had not started is empty."""
    return [reader or {} for part in saved for reader in part["readers"]]


def place_of(reader: dict[str, Any]) -> Place:
    return Place(*reader.get("place", ()))


def next_epoch(readers: Readers) -> int:
    """Return the first epoch that no reader has started."""
    return 1 + max(place_of(reader).epoch for reader in readers if reader) if any(readers) else 0


def left_out(order: ShardOrder, counted: dict[str, dict[str, Any]], readers: Readers) -> str:
    """Say what is not read if all readers start the next epoch: shards, and examples if they are counted.

    `counted` has the records of scripts/shard.py by the names of shards.
    """
    rest = [each for number in range(len(readers)) for each in _rest(order, number, readers)]
    whole = sum(offset == 0 for _, offset in rest)
    buffered = sum(len(reader["buffer"]["kept"]) for reader in readers if reader.get("buffer"))
    found = f"{whole:,} shards and the rest of {len(rest) - whole:,}"
    if buffered:
        found += f", and {buffered:,} examples in shuffle buffers"
    if any(shard.name not in counted for shard, _ in rest):
        return f"{found} (how many examples those shards hold is not known)"
    counts = (_examples(shard, offset, counted[shard.name]) for shard, offset in rest)
    return f"{found}, about {round(sum(counts)) + buffered:,} examples"


def _rest(order: ShardOrder, number: int, readers: Readers) -> Iterator[tuple[Shard, int]]:
    """The shards that a reader has not finished in the epochs that any reader has started, and its offset in each."""
    place = place_of(readers[number])
    for epoch in range(place.epoch, next_epoch(readers)):
        begun = epoch == place.epoch
        for shard in order.of_reader(epoch, number, len(readers))[place.shard if begun else 0 :]:
            yield shard, place.offset if begun else 0
            begun = False


def _examples(shard: Shard, offset: int, record: dict[str, Any]) -> float:
    """How many examples follow an offset; of a tar file a share of its bytes."""
    size = record["examples"] if shard.kind == ".parquet" else record["bytes"]
    return record["examples"] * max(1 - offset / max(size, 1), 0)


def buffer_notes(replayed: bool, readers: Readers) -> Iterator[str]:
    """Say what becomes of shuffle buffers, if there were any: they are read again or start empty."""
    buffered = [reader for reader in readers if reader.get("buffer")]
    if not buffered:
        return
    if replayed:
        rows = sum(reader["buffer"]["rows"] for reader in buffered)
        seconds = max(each["buffer"]["rows"] * each["seconds"] / max(each["rows_read"], 1) for each in buffered)
        yield f"stream: {rows:,} examples are read again for the shuffle buffers, about {seconds:.1f} s"
    else:
        waiting = sum(len(reader["buffer"]["kept"]) for reader in buffered)
        yield (
            f"stream: the shuffle buffers begin empty: {waiting:,} examples that were read and not trained on are "
            "left out of this epoch, and none comes twice"
        )


def skipped(readers: Readers) -> tuple[int, int]:
    """Return how often a shard was skipped, and how many pictures."""
    return sum(each.get("lost_shards", 0) for each in readers), sum(each.get("bad_images", 0) for each in readers)
