"""Lists of images: metadata.jsonl and metadata.csv of a folder, or a JSON-lines file that is the data set itself."""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeGuard

from datasets_lib.checks import find_column
from datasets_lib.errors import InputError, MissingFileError
from datasets_lib.foreign import check_regular, shown
from datasets_lib.images.files import METADATA_BYTES, check_inside, is_inside, lines_of, open_text
from datasets_lib.images.source import CAPTION_COLUMNS, LARGEST_LABEL, check_caption

METADATA_FILES = ("metadata.jsonl", "metadata.csv")
IMAGE_COLUMNS = ("image", "file_name")  # of a JSON-lines file; metadata has the second


class Listed(NamedTuple):
    """The images that a list names, in its order; None for columns that it does not have."""

    images: list[Path]
    captions: list[str | list[str]] | None
    classes: Sequence[str | int] | None
    masks: list[Path] | None


def find_metadata(folder: Path, top: Path, outside: Sequence[str]) -> Path | None:
    """Return the first metadata file in a folder or in the one above; it must not lead out of that."""
    paths = [place / name for place in (folder, top) for name in METADATA_FILES]
    return next((check_inside(path, top, outside) for path in paths if path.exists()), None)


def read_metadata(metadata: Path, folder: Path, excluded: Path | None, images: list[Path], args: Any) -> Listed:
    """Return what the metadata lists of the images in a folder.

    Rows for files outside `folder`, or in its sub-folder `excluded`, belong to another split and are skipped.
    """
    present = set(images)

    def belongs(path: Path, place: str) -> bool:
        if path not in present and path.is_relative_to(folder) and not (excluded and path.is_relative_to(excluded)):
            raise MissingFileError(
                f"{place} names {shown(path)}, which is not there or no image; add the file or remove the row"
            )
        return path in present

    return _read(metadata, ("file_name",), belongs, folder, args, ())


def read_pairs(file: Path, args: Any) -> Listed:
    """Return what a JSON-lines file lists: {"image": path, "text": text} and columns as in metadata."""

    def belongs(path: Path, place: str) -> bool:
        _check_file(path, file.parent, place, args.allow_outside)
        return True

    return _read(file, IMAGE_COLUMNS, belongs, file.parent, args, args.allow_outside)


def _read(
    file: Path,
    names: tuple[str, ...],
    belongs: Callable[[Path, str], bool],
    folder: Path,
    args: Any,
    outside: Sequence[str],
) -> Listed:
    rows = _read_rows(file)
    columns, of_file = dict.fromkeys(name for row in rows for name in row if name not in names), f"(a column of {file})"
    column = find_column(f"base.caption_column {of_file}", args.caption_column, columns, CAPTION_COLUMNS)
    label_column = find_column(f"base.label_column {of_file}", args.label_column, columns, ("label",))
    mask_column = find_column(f"base.mask_column {of_file}", args.mask_column, columns, ("mask",))
    images, captions, labels, masks = [], [], [], []
    for number, row in enumerate(rows, 1):
        place = f"row {number} of {file}"
        path = _path(file, place, row, names, outside)
        if not belongs(path, place):
            continue
        images.append(path)
        if column is not None:
            captions.append(check_caption(row.get(column), f"image {shown(path)}, {place},"))
        if label_column is not None:
            if _is_label(label := row.get(label_column)):
                labels.append(label)
            elif args.label_column:
                found = shown(repr(label))
                raise InputError(f"{place} has no class (found {found}); give it a name, or a number of at least 0")
        if mask_column is not None:
            masks.append(_path(file, place, row, (mask_column,), args.allow_outside))
            _check_file(masks[-1], file.parent, place, args.allow_outside)
    if not images:
        raise InputError(f"{file} names no image in {folder}; give each image a row with its {names[0]}")
    # a column that was not asked for may have gaps: for a task without classes that is no mistake
    complete = label_column is not None and len(labels) == len(images)
    return Listed(images, captions if column else None, labels if complete else None, masks if mask_column else None)


def _is_label(label: Any) -> TypeGuard[str | int]:
    return bool(isinstance(label, str) and label.strip()) or (type(label) is int and 0 <= label <= LARGEST_LABEL)


def _read_rows(file: Path) -> list[dict]:
    with open_text(file, METADATA_BYTES, newline="") as opened:
        lines = lines_of(opened, file)
        return list(_csv_rows(lines, file) if file.suffix == ".csv" else _json_rows(lines, file))


def _csv_rows(lines: Iterator[str], file: Path) -> Iterator[dict]:
    rows = csv.DictReader(lines)
    try:
        yield from rows
    except csv.Error as error:
        raise InputError(f"{shown(file)} cannot be read after line {rows.line_num} ({shown(error)}); mend it") from None


def _json_rows(lines: Iterator[str], file: Path) -> Iterator[dict]:
    for number, line in enumerate(filter(str.strip, lines), 1):
        row = None
        with contextlib.suppress(ValueError, RecursionError):  # no JSON, a number of thousands of digits; nested deeply
            row = json.loads(line)
        if not isinstance(row, dict):
            found = shown(repr(line.strip()))
            raise InputError(
                f"row {number} of {shown(file)} has the line {found}, which is not a JSON object that can be read; "
                "write one object a line"
            )
        yield row


def _path(file: Path, place: str, row: dict, names: tuple[str, ...], outside: Sequence[str]) -> Path:
    name = next((row[column] for column in names if row.get(column)), None)
    if not isinstance(name, str):
        raise InputError(f"{place} has no {' or '.join(map(shown, names))}; name the file relative to {file.parent}")
    relative = PurePosixPath(name)
    leaves = relative.is_absolute() or ".." in relative.parts
    if leaves and not is_inside(file.parent / relative, outside):
        raise InputError(
            f"{place} names {shown(repr(name))}, which leads out of the folder; "
            f"put the image below {file.parent} and name it relative to that"
        )
    return file.parent / relative


def _check_file(path: Path, folder: Path, place: str, outside: Sequence[str]) -> None:
    try:
        check_regular(check_inside(path, folder, outside))
    except (FileNotFoundError, NotADirectoryError):
        raise MissingFileError(
            f"{place} names {shown(path)}, which is not there; add the file or remove the row"
        ) from None
    except (ValueError, OSError) as error:
        raise InputError(f"{place}: {shown(error)}") from None
