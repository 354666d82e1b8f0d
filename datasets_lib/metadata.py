"""metadata.jsonl and metadata.csv: which images a folder's data set has, their captions and classes."""

from __future__ import annotations

import contextlib
import csv
import json
from pathlib import Path, PurePosixPath
from typing import Any

from datasets_lib.choices import one_of
from datasets_lib.source import CAPTION_COLUMNS, check_caption

LABEL_COLUMN = "label"
METADATA_FILES = ("metadata.jsonl", "metadata.csv")


def find_metadata(*folders: Path) -> Path | None:
    """Return the first metadata file in the folders."""
    paths = [folder / name for folder in folders for name in METADATA_FILES]
    return next((path for path in paths if path.is_file()), None)


def read_metadata(
    metadata: Path, folder: Path, excluded: Path | None, images: list[Path], args: Any
) -> tuple[list[Path], list[str | list[str]] | None, list[str | int] | None]:
    """Return the images that the metadata names, in its order, and their captions and classes if it has such columns.

    Rows for files outside of `folder`, or in its sub-folder `excluded`, belong to another split and are passed over.
    """
    rows = _read_rows(metadata)
    column = _column(metadata, rows, "caption_column", args.caption_column, CAPTION_COLUMNS)
    label_column = _column(metadata, rows, "label_column", args.label_column, (LABEL_COLUMN,))
    present, named, captions, labels = set(images), [], [], []
    for number, row in enumerate(rows, 1):
        path = _image_path(metadata, number, row)
        if path in present:
            named.append(path)
            if column is not None:
                captions.append(check_caption(row.get(column), f"image {path}, row {number} of {metadata},"))
            if label_column is not None and (args.label_column or _is_label(row.get(label_column))):
                labels.append(_check_label(row.get(label_column), f"row {number} of {metadata}"))
        elif path.is_relative_to(folder) and not (excluded and path.is_relative_to(excluded)):
            raise FileNotFoundError(
                f"row {number} of {metadata} names {path}, which is not there or no image; "
                "add the file or remove the row"
            )
    if not named:
        raise ValueError(f"{metadata} names no image in {folder}; give each image a row with its file_name")
    # a column that is only called so may have holes; for tasks without classes that is no mistake
    complete = label_column is not None and len(labels) == len(named)
    return named, captions if column is not None else None, labels if complete else None


def _is_label(label: Any) -> bool:
    return bool(isinstance(label, str) and label.strip()) or (type(label) is int and label >= 0)


def _check_label(label: Any, place: str) -> str | int:
    if not _is_label(label):
        raise ValueError(f"{place} has no class (found {label!r}); give it a name, or a number of at least 0")
    return label


def _read_rows(metadata: Path) -> list[dict]:
    with metadata.open(encoding="utf-8-sig", newline="") as file:
        if metadata.suffix == ".csv":
            return list(csv.DictReader(file))
        return [_parse(line, metadata) for line in file if line.strip()]


def _parse(line: str, metadata: Path) -> dict:
    with contextlib.suppress(json.JSONDecodeError):
        if isinstance(row := json.loads(line), dict):
            return row
    raise ValueError(f"{metadata} has the line {line.strip()!r}, which is not a JSON object; write one object a line")


def _column(metadata: Path, rows: list[dict], option: str, wanted: str | None, common: tuple[str, ...]) -> str | None:
    """The column asked for, or the first with a common name, if there is one."""
    columns = dict.fromkeys(column for row in rows for column in row if column != "file_name")
    if wanted is not None:
        return one_of(f"base.{option} (a column of {metadata})", wanted, columns)
    return next((name for name in common if name in columns), None)


def _image_path(metadata: Path, number: int, row: dict) -> Path:
    name = row.get("file_name")
    if not name:
        raise ValueError(f"row {number} of {metadata} has no file_name; name the image relative to {metadata.parent}")
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise ValueError(
            f"row {number} of {metadata} names {name!r}, which leads out of the folder; "
            f"put the image below {metadata.parent} and name it relative to that"
        )
    return metadata.parent / relative
