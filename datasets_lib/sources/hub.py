"""`dataset_name`: a data set of the hub, or a local folder of parquet, arrow or image files, through `datasets`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from datasets_lib.checks import find_column, one_of
from datasets_lib.foreign import check_regular, shown
from datasets_lib.images.image_dataset import ImageDataset
from datasets_lib.images.source import (
    CAPTION_COLUMNS,
    LARGEST_LABEL,
    PICTURE_BYTES,
    Source,
    check_caption,
    check_inside,
    digest,
    resolved,
)
from datasets_lib.sources.local_layout import LayoutError, check_files, check_kinds, check_layout, is_saved


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


def load(args: Any) -> dict[str, Any]:
    """Return the splits by name; any error of `datasets` becomes one that says what to do."""
    import datasets

    with _found(args) as name:
        if is_saved(Path(name)):
            loaded = datasets.load_from_disk(name)
        else:
            builder = datasets.load_dataset_builder(name, args.dataset_config_name, cache_dir=args.cache_dir)
            files = _checked_files(builder, args)
            if Path(name).is_dir():
                check_kinds(files)
            builder.download_and_prepare()
            loaded = builder.as_dataset()
    return loaded if isinstance(loaded, dict) else {"train": loaded}


def data_files(args: Any) -> dict[str, list[str]]:
    """Return the paths or URLs of the files of each split; nothing is loaded. Errors are those of `load`."""
    import datasets

    with _found(args) as name:
        builder = datasets.load_dataset_builder(name, args.dataset_config_name, cache_dir=args.cache_dir)
        return _checked_files(builder, args)


def file_folders(args: Any) -> list[str]:
    """Return the folders that the files of a data set may be in: its own first, those of base.allow_outside last."""
    import datasets
    from huggingface_hub import constants

    if Path(args.dataset_name).expanduser().is_dir():
        return [args.dataset_name, *args.allow_outside]
    downloads = Path(args.cache_dir, "downloads") if args.cache_dir else datasets.config.DOWNLOADED_DATASETS_PATH
    own = Path(constants.HF_HUB_CACHE, f"datasets--{args.dataset_name.replace('/', '--')}")
    return [str(own), str(downloads), *args.allow_outside]


def _checked_files(builder: Any, args: Any) -> dict[str, list[str]]:
    """The files of each split. Those of a folder must be in it, those of the hub on the hub: its card can name any."""
    splits = {str(split): list(files) for split, files in (builder.config.data_files or {}).items()}
    files = [file for each in splits.values() for file in each]
    if Path(args.dataset_name).expanduser().is_dir():
        check_files(files, resolved(args.dataset_name), args.allow_outside)
    elif strangers := [file for file in files if not file.startswith("hf://")]:
        raise LayoutError(
            f"base.dataset_name={args.dataset_name}: its card names {shown(repr(strangers[0]))}, which is not on the "
            "hub; download what it names to a folder, and give that"
        )
    return splits


@contextlib.contextmanager
def _found(args: Any) -> Iterator[str]:
    """The name for `datasets` to load; if the hub does not answer, only the cache is searched, without long retries."""
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    folder, before = Path(args.dataset_name).expanduser(), datasets.config.HF_HUB_OFFLINE
    try:
        if folder.is_dir():
            check_layout(folder.resolve(), args.allow_outside)
        else:
            try:
                HfApi().dataset_info(args.dataset_name, timeout=10)
            except HfHubHTTPError:
                pass  # the hub answered, if only to refuse; load_dataset will say why
            except Exception:
                datasets.config.HF_HUB_OFFLINE = True
        yield str(folder) if folder.is_dir() else args.dataset_name
    except LayoutError:
        raise
    except Exception as error:
        kind = FileNotFoundError if isinstance(error, OSError) else ValueError
        raise kind(
            f"base.dataset_name={args.dataset_name} cannot be loaded ({type(error).__name__}: {shown(error)}). It is "
            f"looked for as a local folder ({folder.absolute()}), in the cache and on the hub, which must be reachable"
            "; else give a local copy: base.dataset_name=FOLDER (parquet, arrow, images or save_to_disk) or "
            "base.train_data_dir=FOLDER (images)"
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def image_column(features: dict[str, Any], wanted: str | None) -> str:
    """Return the column of images: the one asked for, or the only one of type Image."""
    from datasets import Image

    if wanted is not None:
        return one_of("base.image_column", wanted, features)
    found = [name for name, feature in features.items() if isinstance(feature, Image)]
    if len(found) != 1:
        raise ValueError(
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
    labels = rows[column][:]
    usable = [type(label) is int and 0 <= label <= LARGEST_LABEL for label in labels]
    wrong = None if all(usable) else usable.index(False)
    if wrong is not None:
        raise ValueError(
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
        for row, text in enumerate(rows[column][:])
    ]


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
            raise ValueError(
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
