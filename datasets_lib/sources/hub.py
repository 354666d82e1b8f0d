"""`dataset_name`: a data set of the hub, or a local folder of parquet, arrow or image files, through `datasets`."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from datasets_lib.checks import find_column, one_of, repeats_of
from datasets_lib.errors import FileError, InputError, MissingFileError
from datasets_lib.foreign import read_bytes, shown
from datasets_lib.images.files import PICTURE_BYTES, check_inside, resolved
from datasets_lib.images.image_dataset import ImageDataset
from datasets_lib.images.source import CAPTION_COLUMNS, LARGEST_LABEL, Source, check_caption, digest
from datasets_lib.sources.hub_files import file_folders, load
from datasets_lib.sources.walk import walk

LABEL_COLUMNS = ("label", "labels", "class", "target")  # which may hold classes as integers
NO_TEXTS = {"file", "filename", "path", "url", "license", "hash", "sha256", "md5", "id", "key", "source", "split"}
TABLES = (".parquet", ".arrow", ".csv", ".json", ".jsonl")
TAR_CAPTION, TAR_LABEL = "txt", "cls"  # columns that `datasets` makes of a tar's members


def build(args: Any, split: str) -> ImageDataset:
    """Build the data set of `args.dataset_name`; columns not named in `args` are found by type, captions by name."""
    return ImageDataset(read_source(args, split), args, split)


def read_source(args: Any, split: str) -> Source:
    """Return the rows of the split "train", or of a named validation split."""
    splits = load(args)
    named = split == "validation" and isinstance(args.validation_split, str)
    if named:
        rows = splits[one_of(f"base.validation_split of {args.dataset_name}", args.validation_split, splits)]
    else:
        rows = splits[one_of(f"the training split of {args.dataset_name}", "train", splits)]
    masked = mask_column(rows.features, args.mask_column)
    column = image_column({name: kind for name, kind in rows.features.items() if name != masked}, args.image_column)
    labels, label_names, no_labels = read_labels(rows, args.label_column)
    captions = read_captions(rows, args.caption_column, args.dataset_name)
    repeats = read_repeats(rows, args.repeats_column, args.dataset_name)
    taken = (column, masked, args.label_column, args.repeats_column)
    unread = [] if captions else unread_columns({n: k for n, k in rows.features.items() if n not in taken})
    folder, *outside = file_folders(args)
    images = EncodedImages(rows, column, "image_column", folder, outside)
    masks = None if masked is None else EncodedImages(rows, masked, "mask_column", folder, outside)
    sampled = [*images.some_bytes(), *(() if masks is None else masks.some_bytes())]
    counted = [] if repeats is None else [repeats]
    fingerprint = digest(len(rows), sorted(rows.features), label_names, labels, captions, *sampled, *counted)
    notes = [f"no labels: {no_labels}"] if no_labels else []
    return Source(
        images, args.dataset_name, fingerprint, labels, label_names, captions, notes, masks, repeats,
        no_labels=no_labels, unread=unread,
    )  # fmt: skip


def image_column(features: dict[str, Any], wanted: str | None) -> str:
    """Return the column of images: the one asked for, or the only one of type Image."""
    from datasets import Image

    if wanted is not None:
        return one_of("base.image_column", wanted, features)
    found = [name for name, feature in features.items() if isinstance(feature, Image)]
    if len(found) != 1:
        raise InputError(
            f"there are {len(found)} columns of type Image among {', '.join(map(shown, features))}; name one in "
            "base.image_column"
        )
    return found[0]


def mask_column(features: dict[str, Any], wanted: str | None) -> str | None:
    """Return the column of masks: the one asked for, or `mask` if it is a second one of type Image."""
    from datasets import Image

    if wanted is not None:
        return one_of("base.mask_column", wanted, features)
    found = [name for name, feature in features.items() if isinstance(feature, Image)]
    return "mask" if "mask" in found and len(found) > 1 else None


def read_labels(rows: Any, wanted: str | None) -> tuple[list[int] | None, list[str] | None, str | None]:
    """Return labels, their names, and why there are none: of the column asked for or the only one of type ClassLabel.

    In tar files of the hub, integers in the column `cls` are labels, as when they are streamed.
    """
    from datasets import ClassLabel

    found = [name for name, feature in rows.features.items() if isinstance(feature, ClassLabel)]
    if not found and TAR_LABEL in rows.features and _is_integer(rows.features[TAR_LABEL]):
        found = [TAR_LABEL]
    if wanted is None and len(found) != 1:
        integers = [name for name in LABEL_COLUMNS if name in rows.features and _is_integer(rows.features[name])]
        named = ", ".join(map(shown, found or integers))
        return None, None, f"name {'one of ' if len(found) > 1 else ''}{named} in base.label_column" if named else None
    column = found[0] if wanted is None else one_of("base.label_column", wanted, rows.features)
    labels = _values(rows, column)
    usable = [type(label) is int and 0 <= label <= LARGEST_LABEL for label in labels]
    wrong = None if all(usable) else usable.index(False)
    if wrong is not None:
        raise InputError(
            f"column {column!r} has {shown(repr(labels[wrong]))} in row {wrong}; labels are integers of at least 0: "
            "name another column in base.label_column, or encode this one with datasets' class_encode_column"
        )
    return labels, getattr(rows.features[column], "names", None), None


def _is_integer(feature: Any) -> bool:
    return "int" in str(getattr(feature, "dtype", ""))


def read_repeats(rows: Any, column: str | None, origin: str) -> list[int] | None:
    """Return how often each row comes in an epoch, from the column asked for."""
    if column is None:
        return None
    one_of("base.repeats_column", column, rows.features)
    return [repeats_of(value, f"row {row} of {origin}") for row, value in enumerate(_values(rows, column))]


def unread_columns(features: dict[str, Any]) -> list[str]:
    """Describes columns of texts, one of which may hold captions; not those of tar files' keys and of file names."""
    texts = [name for name, kind in features.items() if _is_text(kind) and not name.startswith("__")]
    texts = [name for name in texts if not NO_TEXTS & set(re.split("[^a-z0-9]+", name.lower()))]
    return [f"column {shown(repr(name))} of texts" for name in texts]


def _is_text(feature: Any) -> bool:
    kind = getattr(feature, "feature", feature)  # of a list
    return getattr(kind, "dtype", None) in ("string", "large_string")


def read_captions(rows: Any, wanted: str | None, origin: str) -> list[str | list[str]] | None:
    """Return the captions of the column asked for, or of the first with a common name; None if there is none."""
    column = find_column("base.caption_column", wanted, rows.features, (*CAPTION_COLUMNS, TAR_CAPTION))
    if column is None:
        return None
    return [
        check_caption(text, f"row {row} of {origin}, column {column!r} (base.caption_column),")
        for row, text in enumerate(_values(rows, column))
    ]


def _values(rows: Any, column: str) -> list[Any]:
    """The values of a column as they are stored: one of pictures or sounds is not decoded, whatever it is called."""
    return rows.select_columns([column]).with_format("arrow")[:][column].to_pylist()


class EncodedImages:
    """The images of a column by row: bytes, or the path of a file. A missing one reads as an empty file.

    `datasets` does not decode them, so that every kind of file is treated as in a folder.
    """

    def __init__(self, rows: Any, column: str, option: str, folder: str, outside: Sequence[str]):
        import datasets

        self.column, self.folder, self.outside = column, resolved(folder), outside
        try:
            self.rows = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
        except Exception as error:
            raise InputError(
                f"base.{option} is {column!r}, whose {rows.features[column]} values are not images ({shown(error)}); "
                f"the columns are: {', '.join(map(shown, rows.features))}"
            ) from error

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Path | bytes:
        image = self.rows[row][self.column] or {}
        data, path = image.get("bytes"), image.get("path")
        return self._find(path, row) if data is None and path else data or b""

    def _find(self, name: str, row: int) -> Path:
        """The file of a row, in the folder of the data set or beside one of its tables."""
        for path in (self.folder / name, *(folder / name for folder in self.table_folders)):
            try:
                path = check_inside(path, self.folder, self.outside)
            except InputError as error:
                raise InputError(f"column {self.column!r} of row {row}: {error}") from None
            with contextlib.suppress(OSError):  # a text of thousands of characters, such as a picture in base64
                if path.exists():
                    return path
        raise MissingFileError(
            f"column {self.column!r} of row {row} names {shown(repr(name))}, which is not in {self.folder}, nor beside "
            "a table there; add the file, or make the data set again with the pictures in it"
        )

    @cached_property
    def table_folders(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        files = walk(self.folder, (), self.folder, self.outside)
        return sorted({path.parent for path in files if path.suffix.lower() in TABLES} - {self.folder})

    def some_bytes(self) -> Iterator[bytes]:
        """Yield the content of up to eight images spread over the rows, enough to tell one data set from another.

        One that cannot be read has none, as it is named where it is used.
        """
        for row in range(0, len(self), -(-len(self) // 8)):
            try:
                image = self[row]
                yield read_bytes(image, PICTURE_BYTES) if isinstance(image, Path) else image
            except FileError:
                yield b""
