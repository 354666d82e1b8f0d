"""Lists of images: metadata.jsonl and metadata.csv of a folder, or a JSON-lines file that is the data set itself."""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeGuard

from datasets_lib.checks import find_column
from datasets_lib.images.source import CAPTION_COLUMNS, check_caption, check_inside, open_text

METADATA_FILES = ("metadata.jsonl", "metadata.csv")
IMAGE_COLUMNS = ("image", "file_name")  # of a JSON-lines file; metadata has the second


class Listed(NamedTuple):
    """The images that a list names, in its order; None for columns that it does not have."""

    images: list[Path]
    captions: list[str | list[str]] | None
    classes: Sequence[str | int] | None
    masks: list[Path] | None


def find_metadata(*folders: Path) -> Path | None:
    """Return the first metadata file in the folders."""
    paths = [folder / name for folder in folders for name in METADATA_FILES]
    return next((path for path in paths if path.is_file()), None)


def read_metadata(metadata: Path, folder: Path, excluded: Path | None, images: list[Path], args: Any) -> Listed:
    """Return what the metadata lists of the images in a folder.

    Rows for files outside `folder`, or in its sub-folder `excluded`, belong to another split and are skipped.
    """
    present = set(images)

    def belongs(path: Path, place: str) -> bool:
        if path not in present and path.is_relative_to(folder) and not (excluded and path.is_relative_to(excluded)):
            raise FileNotFoundError(
                f"{place} names {path}, which is not there or no image; add the file or remove the row"
            )
        return path in present

    return _read(metadata, ("file_name",), belongs, folder, args)


def read_pairs(file: Path, args: Any) -> Listed:
    """Return what a JSON-lines file lists: {"image": path, "text": text} and columns as in metadata."""

    def belongs(path: Path, place: str) -> bool:
        _check_file(path, file.parent, place)
        return True

    return _read(file, IMAGE_COLUMNS, belongs, file.parent, args)


def _read(file: Path, names: tuple[str, ...], belongs: Callable[[Path, str], bool], folder: Path, args: Any) -> Listed:
    rows = _read_rows(file)
    columns, of_file = dict.fromkeys(name for row in rows for name in row if name not in names), f"(a column of {file})"
    column = find_column(f"base.caption_column {of_file}", args.caption_column, columns, CAPTION_COLUMNS)
    label_column = find_column(f"base.label_column {of_file}", args.label_column, columns, ("label",))
    mask_column = find_column(f"base.mask_column {of_file}", args.mask_column, columns, ("mask",))
    images, captions, labels, masks = [], [], [], []
    for number, row in enumerate(rows, 1):
        place = f"row {number} of {file}"
        path = _path(file, place, row, names)
        if not belongs(path, place):
            continue
        images.append(path)
        if column is not None:
            captions.append(check_caption(row.get(column), f"image {path}, {place},"))
        if label_column is not None:
            if _is_label(label := row.get(label_column)):
                labels.append(label)
            elif args.label_column:
                raise ValueError(f"{place} has no class (found {label!r}); give it a name, or a number of at least 0")
        if mask_column is not None:
            masks.append(_path(file, place, row, (mask_column,)))
            _check_file(masks[-1], file.parent, place)
    if not images:
        raise ValueError(f"{file} names no image in {folder}; give each image a row with its {names[0]}")
    # a column that was not asked for may have gaps: for a task without classes that is no mistake
    complete = label_column is not None and len(labels) == len(images)
    return Listed(images, captions if column else None, labels if complete else None, masks if mask_column else None)


def _is_label(label: Any) -> TypeGuard[str | int]:
    return bool(isinstance(label, str) and label.strip()) or (type(label) is int and label >= 0)


def _read_rows(file: Path) -> list[dict]:
    with open_text(file, newline="") as lines:
        if file.suffix == ".csv":
            return list(csv.DictReader(lines))
        return [_parse(line, file) for line in lines if line.strip()]


def _parse(line: str, file: Path) -> dict:
    with contextlib.suppress(json.JSONDecodeError):
        if isinstance(row := json.loads(line), dict):
            return row
    raise ValueError(f"{file} has the line {line.strip()!r}, which is not a JSON object; write one object a line")


def _path(file: Path, place: str, row: dict, names: tuple[str, ...]) -> Path:
    name = next((row[column] for column in names if row.get(column)), None)
    if not isinstance(name, str):
        raise ValueError(f"{place} has no {' or '.join(names)}; name the file relative to {file.parent}")
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise ValueError(
            f"{place} names {name!r}, which leads out of the folder; "
            f"put the image below {file.parent} and name it relative to that"
        )
    return file.parent / relative


def _check_file(path: Path, folder: Path, place: str) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{place} names {path}, which is not there; add the file or remove the row")
    check_inside(path, folder)
