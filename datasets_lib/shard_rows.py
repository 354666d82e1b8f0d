"""The rows of one shard, from a place in it: parquet by row number, tar by the byte where an example begins."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

from datasets_lib.folder import EXTENSIONS
from datasets_lib.shards import Shard

READ_ROWS = 32  # of parquet that are in memory at once, beside what is compressed
LATENTS = "safetensors"  # a column, or the end of a member's name: a file of mean and logvar
MASK = "mask"
TEXTS = {"txt": "text", "text": "text", "caption": "caption"}  # ends of names -> columns
LABEL = "cls"


class RawRow(NamedTuple):
    """One row as its shard has it."""

    columns: dict[str, Any]
    name: str  # what messages call it
    following: int  # the place of the next row


def read_rows(shard: Shard, place: int, columns: list[str] | None = None) -> Iterator[RawRow]:
    """Yield the rows from a place on, 0 for the first one; of parquet the named columns.

    Raises what the libraries raise for a file that cannot be read.
    """
    with shard.open() as file:
        if shard.kind == ".parquet":
            yield from _parquet_rows(file, shard, place, columns)
        else:
            yield from _tar_rows(file, shard, place)


def features_of(shard: Shard) -> dict[str, Any]:
    """Return the columns by name with what `datasets` calls their features; of a tar file those of its first row."""
    import datasets

    if shard.kind == ".tar":
        kinds = {"image": datasets.Image(), MASK: datasets.Image()}
        return {name: kinds.get(name) for name in next(read_rows(shard, 0)).columns}
    import pyarrow.parquet

    with shard.open() as file:
        return dict(datasets.Features.from_arrow_schema(pyarrow.parquet.read_schema(file)))


def _parquet_rows(file: IO[bytes], shard: Shard, place: int, columns: list[str] | None) -> Iterator[RawRow]:
    import pyarrow.parquet

    table, first = pyarrow.parquet.ParquetFile(file, pre_buffer="://" in shard.location), 0
    for group in range(table.num_row_groups):
        row, first = first, first + table.metadata.row_group(group).num_rows
        if first <= place:  # its bytes are not read
            continue
        for batch in table.iter_batches(READ_ROWS, row_groups=[group], columns=columns, use_threads=False):
            skipped = min(max(place - row, 0), len(batch))
            row += skipped
            for values in batch.slice(skipped).to_pylist():
                row += 1
                yield RawRow(values, f"row {row - 1} of {shard.name}", row)


def _tar_rows(file: IO[bytes], shard: Shard, place: int) -> Iterator[RawRow]:
    """Rows in WebDataset's layout: the members whose names are equal up to the first dot; nothing is extracted."""
    file.seek(place)
    key, columns, begins = None, {}, place
    with tarfile.open(fileobj=file, mode="r|") as archive:  # one after the other: a member is read once or passed
        while (member := archive.next()) is not None:
            archive.members.clear()  # else it keeps what it knows of each
            folder, slash, name = member.name.rpartition("/")
            stem, _, end = name.partition(".")
            if not member.isreg() or not stem or not end:
                continue
            if key is not None and folder + slash + stem != key:
                begins = place + member.offset
                if columns:
                    yield RawRow(columns, f"{key} of {shard.name}", begins)
                columns = {}
            key = folder + slash + stem
            if _is_known(end.lower()):
                columns |= _columns(end.lower(), archive.extractfile(member).read())
        ended = place + archive.offset
    file.seek(ended)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile takes a broken header for the end
        raise tarfile.ReadError("it ends without an end-of-archive mark, or is broken there")
    if columns:
        yield RawRow(columns, f"{key} of {shard.name}", ended)


def _is_known(end: str) -> bool:
    """Whether a member's kind is read: no other one is, above all none that could hold code."""
    return end in (*TEXTS, LABEL, LATENTS, "json") or f".{end.removeprefix(f'{MASK}.')}" in EXTENSIONS


def _columns(end: str, data: bytes) -> dict[str, Any]:
    """The columns that a member gives; what cannot be read in it becomes an error when its example is made."""
    if end in TEXTS:
        return {TEXTS[end]: data.decode("utf-8", errors="replace").strip()}
    if end == LABEL:
        text = data.decode("ascii", errors="replace").strip()
        return {"label": int(text) if text.isdecimal() else text}
    if end == LATENTS:
        return {LATENTS: data}
    if end == "json":
        return _object(data)
    return {MASK if end.startswith(f"{MASK}.") else "image": data}


def _object(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except ValueError:  # then a column is missing, and its example says so
        found = {}
    if not isinstance(found, dict):
        return {}
    return {key: value for key, value in found.items() if key not in ("image", MASK, LATENTS)}
