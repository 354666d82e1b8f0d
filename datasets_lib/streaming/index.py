"""The index of shards that scripts/shard.py wrote."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from datasets_lib.errors import InputError
from datasets_lib.foreign import read_json, shown
from datasets_lib.images.files import check_inside
from datasets_lib.images.source import LARGEST_LABEL

INDEX, SETTINGS = "index.json", ".settings.json"  # in a folder that is finished, or started
FORMAT = 1
INDEX_BYTES = 256 << 20  # a million shards take a hundred


def read_index(folder: Path, outside: Iterable[str]) -> dict[str, Any]:
    """Return the index of a folder, {} if it has none; raise InputError for one that cannot be."""
    path = folder / INDEX
    if not path.exists():
        return {}
    about = read_json(check_inside(path, folder, outside), INDEX_BYTES)
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise InputError(f"{shown(path)}: written by another version of diffloop; make the shards again")
    wrong = [name for name, holds in VALUES.items() if name in about and not holds(about[name])]
    if wrong:
        found = shown(repr(about[wrong[0]]))
        raise InputError(f"{shown(path)}: {wrong[0]} is {found}, which cannot be; make the shards again")
    return about


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LARGEST_LABEL


def _are_names(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def _are_records(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(record, dict)
        and isinstance(record.get("file"), str)
        and _is_count(record.get("bytes"))
        and _is_count(record.get("examples"))
        for record in value
    )


# what an index may hold
VALUES: dict[str, Callable[[Any], bool]] = {
    "examples": _is_count,
    "label_names": _are_names,
    "highest_label": lambda value: value is None or _is_count(value),
    "resolution": _is_count,
    "channels": _is_count,
    "encoded_by": lambda value: value is None or isinstance(value, str),
    "shards": _are_records,
}
