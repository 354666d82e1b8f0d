"""`train_data_dir`: images in a folder, with captions from metadata or text files, or labels from sub-folders.

It may also be a JSON-lines file that lists images.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

from datasets_lib.errors import InputError, MissingFileError
from datasets_lib.foreign import is_folder, regular_size, shown
from datasets_lib.images.files import resolved
from datasets_lib.images.image_dataset import ImageDataset
from datasets_lib.images.source import Source, digest, refuse_named_split
from datasets_lib.sources.classes import class_folders, class_names, class_of, number_classes, same_but_for_case
from datasets_lib.sources.folder_repeats import numbered_folders, proposal
from datasets_lib.sources.mask_files import Beside, masks_of, split_masks
from datasets_lib.sources.metadata import Listed, find_metadata, read_metadata, read_pairs
from datasets_lib.sources.splits import split_folder, training_folder
from datasets_lib.sources.text_files import ENDINGS, count_text_files, read_text_files, unread_files
from datasets_lib.sources.walk import by_ending, list_files

SUB_FOLDERS = "sub-folders"  # where classes are from without metadata
EXPECTED = (*ENDINGS, ".md", ".jsonl", ".csv", ".parquet")  # beside pictures, which no note counts


class Part(NamedTuple):
    """The files of one split of a folder."""

    top: Path
    folder: Path
    excluded: list[Path]  # sub-folders that belong to other splits
    images: list[Path]
    others: list[Path]


def build(args: Any, split: str) -> ImageDataset:
    """Build the data set of `args.train_data_dir`; a named validation split is the sub-folder of that name.

    Captions come from metadata.jsonl, .csv or .parquet, else from text files with the images' names. Without metadata,
    first-level sub-folders are classes if there are two or more and every image is in one. Hidden files are ignored.
    """
    if args.image_column is not None:
        raise InputError(
            f"base.image_column is {args.image_column!r}, but base.train_data_dir has no such columns; unset it, "
            "or load the folder with base.dataset_name"
        )
    return ImageDataset(read_folder(args, split), args, split)


def read_folder(args: Any, split: str, caption: str | None = None) -> Source:
    """Return what a folder, or a JSON-lines file, has for a split; `caption` is that of images without any."""
    top = resolved(args.train_data_dir)
    is_list = top.suffix.lower() == ".jsonl" and not is_folder(top) and top.exists()
    source = read_list(top, args) if is_list else read_source(top, args, split, caption)
    if source.captions is None and caption is not None:
        source.captions, source.unread = [caption] * len(source.images), ()
    return source


def read_list(file: Path, args: Any) -> Source:
    """Return what a JSON-lines file lists."""
    refuse_named_split(args, f"base.train_data_dir={file}")
    listed = read_pairs(file, args)
    label_names = class_names(listed.classes)
    notes = _class_notes(str(file), label_names)
    labels = number_classes(listed.classes, label_names, file.parent)
    return as_source(listed, file.parent, labels, label_names, notes)


def read_source(top: Path, args: Any, split: str, caption: str | None = None) -> Source:
    """Return the images, captions, labels and masks of a split of a folder; `caption` is that of images without any."""
    if not is_folder(top):
        raise MissingFileError(
            f"base.train_data_dir: there is no folder {top}; give a folder that holds images, or a .jsonl file that "
            "lists them"
        )
    part, notes = _files_of(top, args, split)
    folder = part.folder
    listed, origin, more = _listed(part, args, caption)
    classes = listed.classes
    if split == "validation" and isinstance(args.validation_split, str):
        # A held-out folder may lack a class, so the numbers are always those of the training folder.
        training = read_source(top, args, "train")
        label_names = training.label_names
        if origin == SUB_FOLDERS and label_names is not None:
            classes = [class_of(image, folder) for image in listed.images]
        if training.labels is not None and classes is None:
            raise InputError(f"the images in {folder} have no classes, and those to train on have; give them classes")
    else:
        label_names = class_names(classes)
    labels = number_classes(classes, label_names, folder)
    notes += [*more, *_class_notes(f"the {origin} of {folder}", label_names)]
    named = isinstance(args.validation_split, str)
    # paths below the top, as they were before a folder called train was looked into
    return as_source(listed, folder if named else top, labels, label_names, notes, folder)


def _files_of(top: Path, args: Any, split: str) -> tuple[Part, list[str]]:
    """The files of a split, and a note on folders called like splits that are not read."""
    if isinstance(args.validation_split, str):
        folder, excluded, notes = split_folder(top, args.validation_split, split)
        return Part(top, folder, excluded, *list_files(folder, excluded, top, args.allow_outside)), notes
    images, others = list_files(top, (), top, args.allow_outside)
    folder, left, notes = training_folder(top, images)
    if folder != top:
        images = [path for path in images if path.is_relative_to(folder)]
        others = [path for path in others if not any(map(path.is_relative_to, left))]  # captions may stand above
    return Part(top, folder, left, images, others), notes


def _listed(part: Part, args: Any, caption: str | None) -> tuple[Listed, str, list[str]]:
    """Return captions, classes, masks and repeats of the images, where the classes are from, and notes."""
    beside = split_masks(part.images, args.mask_files)
    images = beside.images
    tables, notes = find_metadata(part.others, part.folder, part.top, args.allow_outside)
    if tables:
        origin = ", ".join(os.path.relpath(table, part.folder) if len(tables) > 1 else table.name for table in tables)
        listed, more = _of_metadata(part, tables, images, origin, args)
    else:
        origin = SUB_FOLDERS
        listed, more = _of_text_files(part, images, args, caption)
    listed, of_repeats = _with_repeats(listed, part, args)
    listed, of_masks = _with_masks(listed, beside, args)
    return listed, origin, [*notes, *more, *of_repeats, *of_masks, *_passed_over(part.others)]


def _of_metadata(
    part: Part, tables: list[Path], images: list[Path], origin: str, args: Any
) -> tuple[Listed, list[str]]:
    listed, notes = read_metadata(tables, part.folder, part.excluded, part.images, args)
    if left_out := len(set(images) - set(listed.images) - set(listed.masks or ())):
        notes.append(f"{left_out} of {len(part.images)} images in {part.folder} are not in {origin}: left out")
    if texts := count_text_files(images, part.others):
        notes.append(f"{texts:,} text files with the names of images are not read: {origin} comes first")
    return listed, notes


def _of_text_files(part: Part, images: list[Path], args: Any, caption: str | None) -> tuple[Listed, list[str]]:
    for option in ("label_column", "mask_column", "repeats_column"):
        if (column := getattr(args, option)) is not None:
            raise InputError(f"base.{option} is {column!r}, but there is no metadata in {part.top}; unset it")
    names = [each.name for each in numbered_folders(images, part.folder)] if args.folder_repeats else None
    fallback = names if caption is None else [caption] * len(images)
    captions, notes = read_text_files(images, part.others, fallback, args)
    classes, no_labels = class_folders(part.folder, images)
    unread = [] if captions else unread_files(images, part.others)
    return Listed(images, captions, names or classes, None, None, no_labels, unread), notes


def _with_repeats(listed: Listed, part: Part, args: Any) -> tuple[Listed, list[str]]:
    if not args.folder_repeats:
        line = proposal(listed.images, part.folder)
        return listed, [] if line is None else [line]
    numbers = [each.repeats for each in numbered_folders(listed.images, part.folder)]
    if listed.repeats is not None:
        numbers = [of_row * of_folder for of_row, of_folder in zip(listed.repeats, numbers, strict=True)]
    return listed._replace(repeats=numbers), []


def _with_masks(listed: Listed, beside: Beside, args: Any) -> tuple[Listed, list[str]]:
    notes = []
    if beside.others:
        notes.append(f"{beside.others:,} images that belong to another one by their names are not used")
    if args.mask_files:
        return listed._replace(masks=masks_of(listed.images, beside.masks)), notes
    unused = sorted(set(beside.masks.values()) - set(listed.images))
    if unused and listed.masks is None:
        notes.append(f"{len(unused):,} masks such as {shown(unused[0])} are not used: set base.mask_files")
    return listed, notes


def _passed_over(others: list[Path]) -> list[str]:
    files = [path for path in others if path.suffix.lower() not in EXPECTED]
    return [f"passed over, as no pictures that are read: {by_ending(files)}"] if files else []


def _class_notes(origin: str, names: list[str] | None) -> list[str]:
    if not names:
        return []
    pairs = same_but_for_case(names)
    more = f"; these differ by case alone: {', '.join(map(shown, pairs))}" if pairs else ""
    return [f"classes from {shown(origin)}: {', '.join(map(shown, names))}{more}"]


def as_source(
    listed: Listed,
    folder: Path,
    labels: list[int] | None,
    label_names: list[str] | None,
    notes: list[str],
    origin: Path | None = None,
) -> Source:
    """Return the images of a folder as rows; their paths below it and their sizes are its fingerprint."""
    masks = [] if listed.masks is None else [name_and_size(mask, folder) for mask in listed.masks]
    files = [name_and_size(image, folder) for image in listed.images]
    repeats = [] if listed.repeats is None else [listed.repeats]
    fingerprint = digest(files, labels, listed.captions, *masks, *repeats)
    return Source(
        listed.images, str(origin or folder), fingerprint, labels, label_names, listed.captions, notes,
        masks=listed.masks, repeats=listed.repeats, no_labels=listed.no_labels, unread=listed.unread,
    )  # fmt: skip


def name_and_size(path: Path, folder: Path) -> tuple[str, int]:
    """Return the path below a folder and the size in bytes, but no time: a copied folder is the same data.

    A link that leads nowhere has none: it is a broken image. Raises FileError for what is no regular file.
    """
    text, begin = str(path), f"{folder}/"
    # a mask may be outside the folder of a split
    name = text[len(begin) :] if text.startswith(begin) and "/../" not in text else os.path.relpath(path, folder)
    try:
        return name, regular_size(path)
    except MissingFileError:
        if path.is_symlink():
            return name, 0
        raise
