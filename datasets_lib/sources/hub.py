"""`dataset_name`: a data set of the hub, or a local folder of parquet, arrow or image files, through `datasets`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from datasets_lib.checks import find_column, one_of
from datasets_lib.errors import InputError
from datasets_lib.foreign import check_regular, shown
from datasets_lib.images.files import PICTURE_BYTES, check_inside, resolved
from datasets_lib.images.image_dataset import ImageDataset
from datasets_lib.images.source import CAPTION_COLUMNS, LARGEST_LABEL, Source, check_caption, digest
from datasets_lib.sources.hub_files import file_folders, load


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
    labels, label_names, notes = read_labels(rows, args.label_column)
    captions = read_captions(rows, args.caption_column, args.dataset_name)
    folder, *outside = file_folders(args)
    images = EncodedImages(rows, column, "image_column", folder, outside)
    masks = None if masked is None else EncodedImages(rows, masked, "mask_column", folder, outside)
    sampled = [*images.some_bytes(), *(() if masks is None else masks.some_bytes())]
    fingerprint = digest(len(rows), sorted(rows.features), label_names, labels, captions, *sampled)
    return Source(images, args.dataset_name, fingerprint, labels, label_names, captions, notes, masks)


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


def read_labels(rows: Any, wanted: str | None) -> tuple[list[int] | None, list[str] | None, list[str]]:
    """Return labels, their names and notes, from the column asked for or the only one of type ClassLabel."""
    from datasets import ClassLabel

    found = [name for name, feature in rows.features.items() if isinstance(feature, ClassLabel)]
    if wanted is None and len(found) != 1:
        return (
            None,
            None,
            [f"no labels: name one of {', '.join(map(shown, found))} in base.label_column"] if found else [],
        )
    column = found[0] if wanted is None else one_of("base.label_column", wanted, rows.features)
    labels = _values(rows, column)
    usable = [type(label) is int and 0 <= label <= LARGEST_LABEL for label in labels]
    wrong = None if all(usable) else usable.index(False)
    if wrong is not None:
        raise InputError(
            f"column {column!r} has {shown(repr(labels[wrong]))} in row {wrong}; labels are integers of at least 0: "
            "name another column in base.label_column, or encode this one with datasets' class_encode_column"
        )
    return labels, getattr(rows.features[column], "names", None), []


def read_captions(rows: Any, wanted: str | None, origin: str) -> list[str | list[str]] | None:
    """Return the captions of the column asked for, or of the first with a common name; None if there is none."""
    column = find_column("base.caption_column", wanted, rows.features, CAPTION_COLUMNS)
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
        if data is None and path:
            return check_inside(self.folder / path, self.folder, self.outside)
        return data or b""

    def some_bytes(self) -> Iterator[bytes]:
        """Yield the content of up to eight images spread over the rows, enough to tell one data set from another."""
        for row in range(0, len(self), -(-len(self) // 8)):
            image = self[row]
            if isinstance(image, Path):
                with check_regular(image).open("rb") as file:
                    image = file.read(PICTURE_BYTES)
            yield image
