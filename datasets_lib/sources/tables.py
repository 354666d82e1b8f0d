"""Rows of tables that list pictures: JSON lines, CSV and parquet; what cannot be read is named with its row or line."""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from datasets_lib.errors import InputError
from datasets_lib.foreign import shown
from datasets_lib.images.files import METADATA_BYTES, TEXT_BYTES, lines_of, open_text
from datasets_lib.sources.parquet_size import check_unpacked

DELIMITERS = ",;\t"  # the second is Excel's where a comma divides whole from tenths


MEANT = ("file_name", "text", "caption", "prompt")  # columns that are read by themselves


class Row(NamedTuple):
    """One row of a table, and what messages call it."""

    columns: dict[str, Any]
    place: str


def read_table(file: Path) -> list[Row]:
    """Read a table by the end of its name: .csv, .parquet, or else JSON lines."""
    kind = file.suffix.lower()
    if kind == ".parquet":
        return list(_parquet_rows(file))
    with open_text(file, METADATA_BYTES, newline="") as opened:
        lines = lines_of(opened, file)
        return list(_csv_rows(lines, file) if kind == ".csv" else _json_rows(lines, file))


def _csv_rows(lines: Iterator[str], file: Path) -> Iterator[Row]:
    header = next((line for line in lines if line.strip() and not line.startswith("sep=")), "")  # Excel's first line
    delimiter = _delimiter(header, file)
    rows = csv.reader(chain([header], lines), delimiter=delimiter, strict=True)
    with _long_fields():
        try:
            names = [name.strip() for name in next(rows)]
            _check_names(names, file)
            for number, fields in enumerate((row for row in rows if any(map(str.strip, row))), 1):
                if len(fields) != len(names):
                    quote = f'; quote texts that have a "{delimiter}"' if len(fields) > len(names) else ""
                    raise InputError(
                        f"row {number} of {shown(file)} (line {rows.line_num}) has {len(fields)} fields, and the "
                        f"header {len(names)} ({', '.join(map(shown, names))}){quote}"
                    )
                yield Row(dict(zip(names, fields, strict=True)), f"row {number} of {file}")
        except csv.Error as error:
            raise InputError(
                f"{shown(file)} cannot be read after line {rows.line_num} ({shown(error)}); mend it"
            ) from None


@contextlib.contextmanager
def _long_fields() -> Iterator[None]:
    """Lets a field be as long as a line may be: a column of embeddings need not be used to be there."""
    before = csv.field_size_limit(TEXT_BYTES)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _delimiter(header: str, file: Path) -> str:
    """The one that divides the header so that a column is called file_name; InputError if none does."""
    most: list[str] = []
    for delimiter in DELIMITERS:
        names = [name.strip() for name in next(csv.reader([header], delimiter=delimiter), [])]
        if "file_name" in names:
            return delimiter
        most = max(most, names, key=len)
    found = shown(", ".join(most)) or "none"
    raise InputError(
        f"{shown(file)}: its first line has no column file_name (columns: {found}); name the column of pictures so, "
        "and divide columns by commas, semicolons or tabs"
    )


def _check_names(names: list[str], file: Path) -> None:
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise InputError(f"{shown(file)}: has the column {shown(repr(twice[0]))} twice; keep one, or rename it")


def _json_rows(lines: Iterator[str], file: Path) -> Iterator[Row]:
    for number, line in enumerate(filter(str.strip, lines), 1):
        row = None
        with contextlib.suppress(ValueError, RecursionError):  # no JSON, a number of thousands of digits; nested deeply
            found = json.loads(line)
            # more colons than keys: one may be there twice; to look always is three times as slow
            doubtful = isinstance(found, dict) and line.count(":") > len(found)
            row = json.loads(line, object_pairs_hook=_or_doubled) if doubtful else found
        if not isinstance(row, dict) or isinstance(row, _Doubled):
            found = shown(repr(line.strip()))
            raise InputError(
                f"row {number} of {shown(file)} has the line {found}, which is not a JSON object that can be read; "
                "write one object a line, with each key once"
            )
        yield Row(row, f"row {number} of {file}")


class _Doubled(dict[str, Any]):
    """An object with a key twice."""


def _or_doubled(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    return found if len(found) == len(pairs) else _Doubled(found)


def _parquet_rows(file: Path) -> Iterator[Row]:
    """The columns of texts, numbers and lists of texts; others, such as embeddings, are not read."""
    import pyarrow
    from pyarrow import parquet

    try:
        schema = parquet.read_schema(file)
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{shown(file)}: cannot be read as parquet ({shown(error)}); make it again") from None
    _check_names(schema.names, file)
    names = [field.name for field in schema if _is_plain(field.type)]
    for field in schema:
        if field.name in MEANT and field.name not in names:
            text = f"its column {field.name} is of the type {shown(field.type)}; make it text, or rename it"
            raise InputError(f"{shown(file)}: {text}")
    try:
        check_unpacked(file)
        rows = parquet.read_table(file, columns=names).to_pylist()
    except (OSError, InputError, pyarrow.ArrowException) as error:
        raise InputError(f"{shown(file)}: {shown(error)}") from None
    yield from (Row(row, f"row {number} of {file}") for number, row in enumerate(rows, 1))


def _is_plain(kind: Any) -> bool:
    from pyarrow import types

    texts = (types.is_string, types.is_large_string, types.is_string_view)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return any(check(kind.value_type) for check in texts)
    checks = (*texts, types.is_integer, types.is_floating, types.is_boolean, types.is_null, types.is_dictionary)
    return any(check(kind) for check in checks)
