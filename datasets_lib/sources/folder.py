"""`train_data_dir`: images in a folder, with captions from metadata or text files, or labels from sub-folders.

It may also be a JSON-lines file that lists images.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from datasets_lib.errors import InputError, MissingFileError
from datasets_lib.foreign import check_regular, shown
from datasets_lib.images.files import resolved
from datasets_lib.images.image_dataset import ImageDataset
from datasets_lib.images.source import Source, digest, refuse_named_split
from datasets_lib.sources.classes import class_folders, class_names, class_of, number_classes, same_but_for_case
from datasets_lib.sources.folder_repeats import numbered_folders, proposal
from datasets_lib.sources.mask_files import masks_of, split_masks
from datasets_lib.sources.metadata import Listed, find_metadata, read_metadata, read_pairs
from datasets_lib.sources.splits import split_folder, training_folder
from datasets_lib.sources.text_files import ENDINGS, count_text_files, read_text_files, unread_files
from datasets_lib.sources.walk import by_ending, list_files

EXPECTED = (*ENDINGS, ".md", ".jsonl", ".csv", ".parquet")  # beside pictures, which no note counts


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
    is_list = top.suffix.lower() == ".jsonl" and top.is_file()
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
    if not top.is_dir():
        raise MissingFileError(
            f"base.train_data_dir: there is no folder {top}; give a folder that holds images, or a .jsonl file that "
            "lists them"
        )
    folder, excluded = split_folder(top, args.validation_split, split)
    found, others = list_files(folder, excluded, top, args.allow_outside)
    notes: list[str] = []
    if not isinstance(args.validation_split, str):
        folder, notes = training_folder(top, found)
        if folder != top:
            found, others = list_files(folder, None, top, args.allow_outside)
    listed, origin, own_notes = _listed(found, others, folder, excluded, top, args, caption)
    notes += own_notes
    classes = listed.classes
    if split == "validation" and isinstance(args.validation_split, str):
        # A held-out folder may lack a class, so the numbers are always those of the training folder.
        training = read_source(top, args, "train")
        label_names = training.label_names
        if origin == "sub-folders" and label_names is not None:
            classes = [class_of(image, folder) for image in listed.images]
        if training.labels is not None and classes is None:
            raise InputError(f"the images in {folder} have no classes, and those to train on have; give them classes")
    else:
        label_names = class_names(classes)
    labels = number_classes(classes, label_names, folder)
    notes += _class_notes(f"the {origin} of {folder}", label_names)
    return as_source(listed, folder, labels, label_names, notes)


def _listed(
    found: list[Path],
    others: list[Path],
    folder: Path,
    excluded: Path | None,
    top: Path,
    args: Any,
    caption: str | None,
) -> tuple[Listed, str, list[str]]:
    """What is known of the images, where it is from, and notes."""
    images, masks = split_masks(found)
    tables, notes = find_metadata(others, folder, top, args.allow_outside)
    numbered = numbered_folders(images, folder) if args.folder_repeats else None
    if tables:
        listed, more = read_metadata(tables, folder, excluded, found, args)
        notes += more
        origin = ", ".join(os.path.relpath(table, folder) for table in tables) if len(tables) > 1 else tables[0].name
        masks = {stem: mask for stem, mask in masks.items() if mask not in listed.images}
        left_out = len(set(images) - set(listed.images) - set(listed.masks or ()))
        if left_out:
            notes.append(f"{left_out} of {len(found)} images in {folder} are not in {origin}: left out")
        if texts := count_text_files(images, others):
            notes.append(f"{texts:,} text files with the names of images are not read: {origin} comes first")
    else:
        origin = "sub-folders"
        for option in ("label_column", "mask_column", "repeats_column"):
            if (column := getattr(args, option)) is not None:
                raise InputError(f"base.{option} is {column!r}, but there is no metadata in {top}; unset it")
        names = None if numbered is None else [numbered[image].name for image in images]
        fallback = [caption] * len(images) if caption is not None else names
        captions, more = read_text_files(images, others, fallback, args)
        notes += more
        classes, no_labels = class_folders(folder, images)
        unread = [] if captions else unread_files(images, others)
        listed = Listed(images, captions, names or classes, None, None, no_labels, unread)
    if numbered is not None:
        once = listed.repeats or [1] * len(listed.images)
        listed = listed._replace(repeats=[n * numbered[i].repeats for n, i in zip(once, listed.images, strict=True)])
    elif (line := proposal(images, folder)) is not None:
        notes.append(line)
    if args.mask_files:
        listed = listed._replace(masks=masks_of(listed.images, masks))
    elif masks and listed.masks is None:
        notes.append(
            f"{len(masks):,} masks such as {shown(next(iter(masks.values())))} are not used: set base.mask_files"
        )
    return listed, origin, [*notes, *_passed_over(others)]


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
    listed: Listed, folder: Path, labels: list[int] | None, label_names: list[str] | None, notes: list[str]
) -> Source:
    """Return the images of a folder as rows; their paths below it and their sizes are its fingerprint."""
    masks = [] if listed.masks is None else [name_and_size(mask, folder) for mask in listed.masks]
    files = [name_and_size(image, folder) for image in listed.images]
    repeats = [] if listed.repeats is None else [listed.repeats]
    fingerprint = digest(files, labels, listed.captions, *masks, *repeats)
    return Source(
        listed.images, str(folder), fingerprint, labels, label_names, listed.captions, notes, masks=listed.masks,
        repeats=listed.repeats, no_labels=listed.no_labels, unread=listed.unread,
    )  # fmt: skip


def name_and_size(path: Path, folder: Path) -> tuple[str, int]:
    """Return the path below a folder and the size in bytes, but no time: a copied folder is the same data.

    A link that leads nowhere has none: it is a broken image. Raises FileError for what is no regular file.
    """
    # a mask may be outside the folder of a split
    name = Path(os.path.relpath(path, folder)).as_posix()
    if path.is_symlink() and not path.exists():
        return name, 0
    return name, check_regular(path).stat().st_size
