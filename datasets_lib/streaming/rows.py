"""The rows of one shard, from a place in it: a row number of parquet, the first byte of an example in tar."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

from datasets_lib.foreign import shown
from datasets_lib.images.source import PICTURE_BYTES, TEXT_BYTES
from datasets_lib.sources.folder import EXTENSIONS
from datasets_lib.sources.parquet_size import unpacked_bytes, unpacked_limit
from datasets_lib.streaming.shards import Shard

READ_ROWS = 8  # of parquet that are decoded at once, at most: a footer may understate them
LATENTS = "safetensors"  # a column, or the end of a member's name: a file with mean and logvar
MASK = "mask"
TEXTS = {"txt": "text", "text": "text", "caption": "caption"}  # ends of names -> columns
LABEL = "cls"
OTHERS = {**TEXTS, LABEL: "label", LATENTS: LATENTS, "json": "json"}  # ends of other files' names -> columns
LABEL_DIGITS = 19  # with fewer it is an int64
HEADER_BYTES = 16 << 10  # of a tar member's further headers: Python before 3.11.10 takes minutes for a large one
HEADERS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


class RawRow(NamedTuple):
    """One row as its shard has it."""

    columns: dict[str, Any]
    name: str  # what messages call it
    following: int  # the place of the next row


def read_rows(shard: Shard, place: int, columns: list[str] | None = None) -> Iterator[RawRow]:
    """Yield the rows from a place on, 0 for the first one; `columns` limits parquet. Raises the libraries' errors."""
    with shard.open() as file:
        if shard.kind == ".parquet":
            yield from _parquet_rows(file, shard, place, columns)
        else:
            yield from _tar_rows(file, shard, place)


def features_of(shard: Shard) -> dict[str, Any]:
    """Return the columns by name, with their features in `datasets`; a tar file has those of its first row."""
    import datasets

    if shard.kind == ".tar":
        kinds = {"image": datasets.Image(), MASK: datasets.Image()}
        for row in read_rows(shard, 0):
            return {name: kinds.get(name) for name in row.columns}
        raise ValueError("it has no members such as key.jpg")
    import pyarrow.parquet

    with shard.open() as file:
        return dict(datasets.Features.from_arrow_schema(pyarrow.parquet.read_schema(file)))


def _parquet_rows(file: IO[bytes], shard: Shard, place: int, columns: list[str] | None) -> Iterator[RawRow]:
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
            if kept.nbytes > len(kept) * PICTURE_BYTES + TEXT_BYTES:  # the file says less of itself
                raise ValueError(f"its rows from {row:,} on have more than {PICTURE_BYTES:,} bytes each")
            for values in kept.to_pylist():
                _check_sizes(values, row)
                row += 1
                yield RawRow(values, f"row {row - 1} of {shown(shard.name)}", row)
        if row != first:  # places are counted from it
            raise ValueError(f"its row group {group} ends at row {row:,} and should at {first:,}")


def _rows_at_once(group: Any, columns: list[str] | None) -> int:
    """How many rows of a group are decoded at once, as each may be a repetition of all that it holds.

    Raises ValueError if what it holds would fill the memory.
    """
    chunks = [group.column(number) for number in range(group.num_columns)]
    chunks = [chunk for chunk in chunks if columns is None or chunk.path_in_schema.split(".")[0] in columns]
    size = sum(chunk.total_uncompressed_size for chunk in chunks)
    if unpacked_bytes(chunks) > (limit := unpacked_limit(chunks)):
        raise ValueError(f"a row group takes {size:,} bytes of memory, and may take {limit:,}")
    return min(max(PICTURE_BYTES // max(size, 1), 1), READ_ROWS)


def _check_sizes(values: dict[str, Any], row: int) -> None:
    for column, value in values.items():
        data = value.get("bytes") if isinstance(value, dict) else value
        limit = PICTURE_BYTES if isinstance(data, bytes) else TEXT_BYTES
        if isinstance(data, bytes | str) and len(data) > limit:
            raise ValueError(
                f"row {row} has {len(data):,} bytes in column {shown(column)}, and at most {limit:,} are read"
            )


class _Header(tarfile.TarInfo):
    """A member's header, whose further headers must be short."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        found = super().frombuf(buf, encoding, errors)
        if found.type in HEADERS and found.size > HEADER_BYTES:
            raise tarfile.ReadError(f"a header has {found.size:,} bytes, and may have {HEADER_BYTES:,}")
        return found


def _tar_rows(file: IO[bytes], shard: Shard, place: int) -> Iterator[RawRow]:
    """Rows in WebDataset's layout: the members whose names are equal up to the first dot; nothing is extracted."""
    file.seek(place)
    key, begins = None, place
    parts: dict[str, bytes | None] = {}
    # mode "r|": members are read or skipped in one pass; names in other encodings are escaped
    with tarfile.open(fileobj=file, mode="r|", errors="backslashreplace", tarinfo=_Header) as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # typeshed has no members; it would keep them all
            folder, slash, name = member.name.rpartition("/")
            stem, _, end = name.partition(".")
            if member.isdir() or not stem or not end:
                continue
            if key is not None and folder + slash + stem != key:
                begins = place + member.offset
                if parts:
                    yield RawRow(_columns(parts), shown(f"{key} of {shard.name}"), begins)
                parts = {}
            key = folder + slash + stem
            _add_part(parts, end.lower(), archive, member)
        ended = place + archive.offset
    file.seek(ended)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile takes a broken header for the end
        raise tarfile.ReadError("it ends without an end-of-archive mark, or is broken there")
    if parts:
        yield RawRow(_columns(parts), shown(f"{key} of {shard.name}"), ended)


def _add_part(parts: dict[str, bytes | None], end: str, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
    """Reads a member into the parts of its example."""
    column = _column_of(end)
    if column is None or not member.isreg():
        if f".{end.rpartition('.')[2]}" in EXTENSIONS:  # a link, or a.b.jpg: its example lacks a picture, and says so
            parts.setdefault("image", None)
        return
    if parts.get(column) is not None:
        raise tarfile.ReadError(f"its member {shown(member.name)} is the second {column} of its example")
    limit = PICTURE_BYTES if column in ("image", MASK, LATENTS) else TEXT_BYTES
    if member.size > limit:  # which a sparse member need not have
        raise tarfile.ReadError(f"its member {shown(member.name)} has {member.size:,} bytes, more than {limit:,}")
    file = archive.extractfile(member)
    assert file is not None  # it is a regular file
    parts[column] = file.read()


def _column_of(end: str) -> str | None:
    """The column that a member holds, "json" for several; None if it is not read, such as one that could hold code."""
    if end in OTHERS:
        return OTHERS[end]
    if f".{end.removeprefix(f'{MASK}.')}" in EXTENSIONS:
        return MASK if end.startswith(f"{MASK}.") else "image"
    return None


def _columns(parts: dict[str, bytes | None]) -> dict[str, Any]:
    """The columns of an example; an unreadable value becomes an error when the example is made."""
    found: dict[str, Any] = {}
    for column, data in parts.items():
        if data is None:
            found[column] = None
        elif column == "json":
            found |= _object(data)
        elif column in TEXTS.values():
            found[column] = data.decode("utf-8", errors="replace").strip()
        elif column == "label":
            text = data.decode("ascii", errors="replace").strip()
            found[column] = int(text) if text.isdecimal() and len(text) < LABEL_DIGITS else text
        else:
            found[column] = data
    return found


def _object(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):  # then a column is missing, and its example says so
        found = {}
    if not isinstance(found, dict):
        return {}
    return {key: value for key, value in found.items() if key not in ("image", MASK, LATENTS)}
