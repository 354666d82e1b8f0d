"""The rows of one shard, from a place in it: a row number of parquet, the first byte of an example in tar."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from datasets_lib.errors import InputError
from datasets_lib.streaming.parquet_rows import parquet_rows
from datasets_lib.streaming.raw_row import MASK, RawRow
from datasets_lib.streaming.shards import Shard
from datasets_lib.streaming.tar_rows import tar_rows


def read_rows(shard: Shard, place: int, columns: list[str] | None = None) -> Iterator[RawRow]:
    """Yield the rows from a place on, 0 for the first one; `columns` limits parquet. Raises the libraries' errors."""
    with shard.open() as file:
        if shard.kind == ".parquet":
            yield from parquet_rows(file, shard, place, columns)
        else:
            yield from tar_rows(file, shard, place)


def features_of(shard: Shard) -> dict[str, Any]:
    """Return the columns by name, with their features in `datasets`; a tar file has those of its first row."""
    import datasets

    if shard.kind == ".tar":
        kinds = {"image": datasets.Image(), MASK: datasets.Image()}
        for row in read_rows(shard, 0):
            return {name: kinds.get(name) for name in row.columns}
        raise InputError("it has no members such as key.jpg")
    import pyarrow.parquet

    with shard.open() as file:
        return dict(datasets.Features.from_arrow_schema(pyarrow.parquet.read_schema(file)))
