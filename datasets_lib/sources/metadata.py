"""Lists of pictures: metadata.jsonl, .csv or .parquet of a folder and its sub-folders, or a table of its own."""

from __future__ import annotations

import contextlib
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

from datasets_lib.checks import find_column, repeats_of
from datasets_lib.errors import InputError, MissingFileError, UserError
from datasets_lib.foreign import check_regular, composed, entries, shown
from datasets_lib.images.files import check_inside, is_inside, resolved
from datasets_lib.images.source import CAPTION_COLUMNS, LARGEST_LABEL, check_caption
from datasets_lib.sources.tables import Row, read_table

METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # the first of them in a folder is read
IMAGE_COLUMNS = ("image", "file_name")  # of a table that is the data set; metadata has the second
LIKE_LABELS = ("label", "labels", "class", "classes", "category", "target")  # what a column of classes may be called
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
    no_labels: str | None = None  # why a column of classes is not used, or which may be one
    unread: Sequence[str] = ()  # what looks like captions, and is not read


class Lookup:
    """Finds the file that a table's name means: with backslashes, or with accents in another Unicode form, too."""

    def __init__(self, present: Iterable[Path]) -> None:
        self.present = set(present)
        self.composed = {composed(path): path for path in self.present if not str(path).isascii()}

    def __call__(self, path: Path) -> Path:
        if path in self.present:
            return path
        slashed = Path(str(path).replace("\\", "/"))
        if (found := self.composed.get(composed(path))) is not None:
            return found
        return slashed if slashed in self.present else self.composed.get(composed(slashed), path)


def find_metadata(others: list[Path], folder: Path, top: Path, outside: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Return the tables of a folder and its sub-folders, else those of the ones above, and notes on others."""
    found = [path for path in others if path.name.lower() in METADATA_FILES and path.is_relative_to(folder)]
    place = folder
    while place != top and not any(path.parent == place for path in found):
        place = place.parent
        above = [path for path in entries(place) if path.name.lower() in METADATA_FILES]
        found = [*(check_inside(path, top, outside) for path in above), *found]
    best: dict[Path, Path] = {}
    notes = []
    for path in sorted(found, key=lambda path: METADATA_FILES.index(path.name.lower())):
        if path.parent in best:
            notes.append(f"{shown(path)} is not read: {best[path.parent].name} beside it comes first")
        best.setdefault(path.parent, path)
    return sorted(best.values(), key=lambda path: (len(path.parts), path)), notes


def read_metadata(
    tables: list[Path], folder: Path, excluded: Sequence[Path], images: list[Path], args: Any
) -> tuple[Listed, list[str]]:
    """Return what the tables list of the images in a folder, and notes; of an image's tables the nearest counts.

    Rows for files outside `folder`, or in its sub-folders `excluded`, belong to another split and are skipped.
    """
    find = Lookup(images)
    rows = [
        Named(table, row, _path(table, row, ("file_name",), (), find)) for table in tables for row in read_table(table)
    ]
    for table, row, path in rows:
        if path in find.present or not path.is_relative_to(folder) or any(map(path.is_relative_to, excluded)):
            continue
        raise _missing(row.place, path, table.parent, " or no image")
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
    """The file that a name means, as Lookup finds it among those that are listed."""
    text = str(path)
    for name in (text, text.replace("\\", "/"), *(unicodedata.normalize(form, text) for form in ("NFC", "NFD"))):
        with contextlib.suppress(OSError):  # a name that is too long: it is checked later
            if Path(name).exists():
                return Path(name)
    return path


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
    classes, no_labels = _classes(used, label, args)
    counts = None if repeats is None else [repeats_of(row.columns.get(repeats), row.place) for _, row, _ in used]
    unread = [] if caption else wordy(columns.keys() - {label, mask, repeats}, [row.columns for _, row, _ in used])
    return Listed([each.path for each in used], captions, classes, masks, counts, no_labels, unread)


def _classes(used: list[Named], column: str | None, args: Any) -> tuple[list[str | int] | None, str | None]:
    """The classes, or why there are none: a column that was not asked for may have gaps."""
    if column is None:
        named = [name for name in used[0].row.columns if name.strip().lower() in LIKE_LABELS]
        return None, f"name the column {shown(repr(named[0]))} in base.label_column" if named else None
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
        return composed(value.strip()) or None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if type(value) is int and 0 <= value <= LARGEST_LABEL else None


def wordy(columns: Iterable[str], rows: Sequence[dict[str, Any]]) -> list[str]:
    """Describes the columns that look like captions: called so, or of texts of which many have several words."""
    found = []
    for column in sorted(columns):
        values = [row[column] for row in rows if row.get(column) is not None]
        texts = [text for value in values for text in (value if isinstance(value, list) else [value])]
        texts = [text for text in texts if isinstance(text, str)]
        if not texts or len(texts) < len(values):
            continue
        called_so = any(word in column.lower() for word in (*CAPTION_COLUMNS, "description", "tags"))
        several = sum(bool(set(text.strip()) & set(" ,")) for text in texts)
        if called_so or several > WORDY * len(texts):
            found.append(f"column {shown(repr(column))}")
    return found


def _path(table: Path, row: Row, names: tuple[str, ...], outside: Sequence[str], find: Callable[[Path], Path]) -> Path:
    name, folder = next((row.columns[column] for column in names if row.columns.get(column)), None), table.parent
    if not isinstance(name, str):
        raise InputError(f"{row.place} has no {' or '.join(map(shown, names))}; name the file relative to {folder}")
    plain = not (name.startswith("/") or ".." in name or ":" in name or "\\" in name)
    return find(folder / (name if plain else _relative(name, folder, row, outside)))


def _relative(name: str, folder: Path, row: Row, outside: Sequence[str]) -> PurePosixPath | Path:
    """A name that may lead elsewhere; raises InputError if it leads out of the folder."""
    path = PurePosixPath(name)
    if not (path.is_absolute() or ".." in PurePosixPath(name.replace("\\", "/")).parts):
        return path
    target = resolved(folder / path)
    if target.is_relative_to(folder):
        return target.relative_to(folder)
    if is_inside(target, outside):
        return path
    raise InputError(
        f"{row.place} names {shown(repr(name))}, which leads out of the folder; "
        f"put the image below {folder} and name it relative to that"
    )


def _missing(place: str, path: Path, folder: Path, what: str) -> MissingFileError:
    name = str(path)[len(str(folder)) + 1 :]
    hint = f"; it is a path of Windows: name the file below {folder}" if PureWindowsPath(name).drive else ""
    return MissingFileError(
        f"{place} names {shown(path)}, which is not there{what}; add the file or remove the row{hint}"
    )


def _check_file(path: Path, folder: Path, place: str, outside: Sequence[str]) -> None:
    try:
        check_regular(check_inside(path, folder, outside))
    except MissingFileError:
        raise _missing(place, path, folder, "") from None
    except UserError as error:
        raise InputError(f"{place}: {shown(error)}") from None
