"""Lists of pictures: metadata.jsonl, .csv or .parquet of a folder and its sub-folders, or a table of its own."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

from datasets_lib.checks import LARGEST_REPEATS, find_column
from datasets_lib.errors import InputError, MissingFileError
from datasets_lib.foreign import check_regular, entries, shown
from datasets_lib.images.files import check_inside, is_inside
from datasets_lib.images.source import CAPTION_COLUMNS, LARGEST_LABEL, check_caption
from datasets_lib.sources.tables import Row, read_table

METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # the first of them in a folder is read
IMAGE_COLUMNS = ("image", "file_name")  # of a table that is the data set; metadata has the second
WORDY = 0.5  # share of a column's texts with a space or comma, from which it looks like captions


class Named(NamedTuple):
    """A row of a table, and the picture that it names."""

    table: Path
    row: Row
    path: Path


class Listed(NamedTuple):
    """The pictures that tables name, in their order; None for columns that they do not have."""

    images: list[Path]
    captions: list[str | list[str]] | None = None
    classes: Sequence[str | int] | None = None
    masks: list[Path] | None = None
    repeats: list[int] | None = None
    no_labels: str | None = None  # why a column of classes is not used
    unread: Sequence[str] = ()  # what looks like captions, and is not read


class Lookup:
    """Finds the file that a table's name means: with backslashes, or with accents in another Unicode form, too."""

    def __init__(self, present: Iterable[Path]) -> None:
        self.present = set(present)
        self.composed = {_composed(path): path for path in self.present if not str(path).isascii()}

    def __call__(self, path: Path) -> Path:
        if path in self.present:
            return path
        for candidate in (path, Path(str(path).replace("\\", "/"))):
            if candidate in self.present:
                return candidate
            if (found := self.composed.get(_composed(candidate))) is not None:
                return found
        return path


def _composed(path: Path) -> str:
    return unicodedata.normalize("NFC", str(path))


def find_metadata(others: list[Path], folder: Path, top: Path, outside: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Return the tables of a folder and its sub-folders, else those of the one above, and notes on others."""
    found = [path for path in others if path.name.lower() in METADATA_FILES]
    if top != folder and not any(path.parent == folder for path in found):
        above = [path for path in entries(top) if path.name.lower() in METADATA_FILES]
        found = [*(check_inside(path, top, outside) for path in above), *found]
    best: dict[Path, Path] = {}
    notes = []
    for path in sorted(found, key=lambda path: METADATA_FILES.index(path.name.lower())):
        if path.parent in best:
            notes.append(f"{shown(path)} is not read: {best[path.parent].name} beside it comes first")
        best.setdefault(path.parent, path)
    return sorted(best.values(), key=lambda path: (len(path.parts), path)), notes


def read_metadata(
    tables: list[Path], folder: Path, excluded: Path | None, images: list[Path], args: Any
) -> tuple[Listed, list[str]]:
    """Return what the tables list of the images in a folder, and notes; of an image's tables the nearest counts.

    Rows for files outside `folder`, or in its sub-folder `excluded`, belong to another split and are skipped.
    """
    find = Lookup(images)
    rows = [
        Named(table, row, _path(table, row, ("file_name",), (), find)) for table in tables for row in read_table(table)
    ]
    for _, row, path in rows:
        if path in find.present or not path.is_relative_to(folder) or (excluded and path.is_relative_to(excluded)):
            continue
        raise MissingFileError(
            f"{row.place} names {shown(path)}, which is not there or no image; add the file or remove the row"
        )
    rows = [each for each in rows if each.path in find.present]
    nearest = {each.path: each.table for each in rows}  # the tables of sub-folders come last
    used = [each for each in rows if nearest[each.path] == each.table]
    names = ", ".join(str(table) for table in tables)
    if not used:
        raise InputError(f"{names} names no image in {folder}; give each image a row with its file_name")
    notes = []
    if len(used) < len(rows):
        notes.append(f"{len(rows) - len(used):,} rows are not used: a metadata file nearer to the image has it too")
    return _listed(used, names, {"file_name"}, args), notes


def read_pairs(file: Path, args: Any) -> Listed:
    """Return what a table lists: {"image": path, "text": text} and columns as in metadata."""
    rows = [
        Named(file, row, _path(file, row, IMAGE_COLUMNS, args.allow_outside, _existing)) for row in read_table(file)
    ]
    for _, row, path in rows:
        _check_file(path, file.parent, row.place, args.allow_outside)
    if not rows:
        raise InputError(f"{file} names no image in {file.parent}; give each image a row with its image")
    return _listed(rows, str(file), set(IMAGE_COLUMNS), args)


def _existing(path: Path) -> Path:
    other = Path(str(path).replace("\\", "/"))
    return other if other != path and not path.exists() else path


def _listed(used: list[Named], origin: str, names: set[str], args: Any) -> Listed:
    """The columns of the rows that are used; raises InputError for an option that names none of them."""
    columns = dict.fromkeys(name for _, row, _ in used for name in row.columns if name not in names)
    of_file = f"(a column of {origin})"
    caption = find_column(f"base.caption_column {of_file}", args.caption_column, columns, CAPTION_COLUMNS)
    label = find_column(f"base.label_column {of_file}", args.label_column, columns, ("label",))
    mask = find_column(f"base.mask_column {of_file}", args.mask_column, columns, ("mask",))
    repeats = find_column(f"base.repeats_column {of_file}", args.repeats_column, columns, ())
    captions, masks = None, None
    if caption is not None:
        captions = [
            check_caption(row.columns.get(caption), f"image {shown(path)}, {row.place},") for _, row, path in used
        ]
    if mask is not None:
        masks = [_path(table, row, (mask,), args.allow_outside, _existing) for table, row, _ in used]
        for (table, row, _), path in zip(used, masks, strict=True):
            _check_file(path, table.parent, row.place, args.allow_outside)
    classes, no_labels = (None, None) if label is None else _classes(used, label, args)
    counts = None if repeats is None else [repeats_of(row.columns.get(repeats), row.place) for _, row, _ in used]
    unread = [] if caption else wordy(columns.keys() - {label, mask, repeats}, [row.columns for _, row, _ in used])
    return Listed([each.path for each in used], captions, classes, masks, counts, no_labels, unread)


def _classes(used: list[Named], column: str, args: Any) -> tuple[list[str | int] | None, str | None]:
    """The classes, or why there are none: a column that was not asked for may have gaps."""
    classes = []
    for _, row, _ in used:
        value = _label(row.columns.get(column))
        if value is None:
            found = shown(repr(row.columns.get(column)))
            problem = f"{row.place} has no class (found {found}); give it a name, or a number of at least 0"
            if args.label_column:
                raise InputError(problem)
            return None, f"column {column!r} is not used as labels: {problem}"
        classes.append(value)
    return classes, None


def _label(value: Any) -> str | int | None:
    """A class's name, or its number: pandas writes 1 as 1.0 if a value of the column is missing."""
    if isinstance(value, str):
        return unicodedata.normalize("NFC", value.strip()) or None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if type(value) is int and 0 <= value <= LARGEST_LABEL else None


def repeats_of(value: Any, place: str) -> int:
    """How often an example comes in an epoch; raises InputError for anything but a whole number from 1 on."""
    number = int(value) if isinstance(value, str) and value.strip().isdecimal() and len(value) < 10 else value
    if isinstance(number, float) and number.is_integer():
        number = int(number)
    if type(number) is not int or not 1 <= number <= LARGEST_REPEATS:
        found = shown(repr(value))
        raise InputError(
            f"{place} has the repeats {found} (base.repeats_column); give a whole number from 1 to {LARGEST_REPEATS:,}"
        )
    return number


def wordy(columns: Iterable[str], rows: Sequence[dict[str, Any]]) -> list[str]:
    """Describes the columns that look like captions: called so, or of texts of which many have several words."""
    found = []
    for column in sorted(columns):
        values = [row[column] for row in rows if row.get(column) is not None]
        texts = [value for value in values if isinstance(value, str)]
        if not texts or len(texts) < len(values):
            continue
        called_so = any(word in column.lower() for word in (*CAPTION_COLUMNS, "description", "tags"))
        several = Counter(bool(set(text.strip()) & set(" ,")) for text in texts)[True]
        if called_so or several > WORDY * len(texts):
            found.append(f"column {shown(repr(column))}")
    return found


def _path(table: Path, row: Row, names: tuple[str, ...], outside: Sequence[str], find: Callable[[Path], Path]) -> Path:
    name, folder = next((row.columns[column] for column in names if row.columns.get(column)), None), table.parent
    if not isinstance(name, str):
        raise InputError(f"{row.place} has no {' or '.join(map(shown, names))}; name the file relative to {folder}")
    plain = not (name.startswith("/") or ".." in name or ":" in name or "\\" in name)
    return find(folder / (name if plain else _relative(name, folder, row, outside)))


def _relative(name: str, folder: Path, row: Row, outside: Sequence[str]) -> PurePosixPath:
    """A name that is absolute, leads upwards or is one of Windows'; raises InputError if it leads out of the folder."""
    if PureWindowsPath(name).drive:
        raise InputError(f"{row.place} names {shown(repr(name))}, a path of Windows; name the file below {folder}")
    relative = PurePosixPath(name)
    if relative.is_absolute() and relative.is_relative_to(folder):
        relative = relative.relative_to(folder)
    leaves = relative.is_absolute() or ".." in PurePosixPath(name.replace("\\", "/")).parts
    if leaves and not is_inside(folder / relative, outside):
        raise InputError(
            f"{row.place} names {shown(repr(name))}, which leads out of the folder; "
            f"put the image below {folder} and name it relative to that"
        )
    return relative


def _check_file(path: Path, folder: Path, place: str, outside: Sequence[str]) -> None:
    try:
        check_regular(check_inside(path, folder, outside))
    except FileNotFoundError:
        raise MissingFileError(
            f"{place} names {shown(path)}, which is not there; add the file or remove the row"
        ) from None
    except (ValueError, OSError) as error:
        raise InputError(f"{place}: {shown(error)}") from None
