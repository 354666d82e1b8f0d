"""The rows of a parquet shard, few at a time: a row may be a repetition of all that its group holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, Any

from datasets_lib.errors import InputError
from datasets_lib.foreign import shown
from datasets_lib.images.files import PICTURE_BYTES, TEXT_BYTES
from datasets_lib.sources.parquet_size import unpacked_bytes, unpacked_limit
from datasets_lib.streaming.raw_row import RawRow
from datasets_lib.streaming.shards import Shard

READ_ROWS = 8  # that are decoded at once, at most: a footer may understate them


def parquet_rows(file: IO[bytes], shard: Shard, place: int, columns: list[str] | None) -> Iterator[RawRow]:
    """Yield the rows from a place on, 0 for the first one."""
    import pyarrow.parquet

    table, first = pyarrow.parquet.ParquetFile(file, pre_buffer=bool(shard.scheme)), 0
    for group in range(table.num_row_groups):
        row, first = first, first + table.metadata.row_group(group).num_rows
        if first <= place:  # its bytes are not read
            continue
        at_once = _rows_at_once(table.metadata.row_group(group), columns)
        for batch in table.iter_batches(at_once, row_groups=[group], columns=columns, use_threads=False):
            skipped = min(max(place - row, 0), len(batch))
            row += skipped
            kept = batch.slice(skipped)
            if kept.nbytes > 2 * PICTURE_BYTES + TEXT_BYTES:  # a picture and a mask; then the footer understates them
                raise InputError(f"its rows from {row:,} on have {kept.nbytes:,} bytes, more than its footer says")
            for values in kept.to_pylist():
                _check_sizes(values, row)
                row += 1
                yield RawRow(values, f"row {row - 1} of {shown(shard.name)}", row)
        if row != first:  # places are counted from it
            raise InputError(f"its row group {group} ends at row {row:,} and should at {first:,}")


def _rows_at_once(group: Any, columns: list[str] | None) -> int:
    """How many rows of a group are decoded at once, as each may be a repetition of all that it holds.

    Raises ValueError if what it holds would fill the memory.
    """
    chunks = [group.column(number) for number in range(group.num_columns)]
    if columns is not None:  # image.bytes is in the column image
        starts = tuple(f"{name}." for name in columns)
        chunks = [chunk for chunk in chunks if f"{chunk.path_in_schema}.".startswith(starts)]
    size = sum(chunk.total_uncompressed_size for chunk in chunks)
    if unpacked_bytes(chunks) > (limit := unpacked_limit(chunks)):
        raise InputError(f"a row group takes {size:,} bytes of memory, and may take {limit:,}")
    return min(max(PICTURE_BYTES // max(size, 1), 1), READ_ROWS)


def _check_sizes(values: dict[str, Any], row: int) -> None:
    for column, value in values.items():
        data = value.get("bytes") if isinstance(value, dict) else value
        limit = PICTURE_BYTES if isinstance(data, bytes) else TEXT_BYTES
        if isinstance(data, bytes | str) and len(data) > limit:
            raise InputError(
                f"row {row} has {len(data):,} bytes in column {shown(column)}, and at most {limit:,} are read"
            )
