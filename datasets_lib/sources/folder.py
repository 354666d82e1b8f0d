"""`train_data_dir`: images in a folder, with captions from metadata or text files, or labels from sub-folders.

It may also be a JSON-lines file that lists images.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from datasets_lib.checks import one_of
from datasets_lib.errors import InputError, MissingFileError
from datasets_lib.foreign import check_regular, shown
from datasets_lib.images.files import TEXT_BYTES, check_inside, is_inside, open_text, resolved
from datasets_lib.images.image_dataset import ImageDataset
from datasets_lib.images.source import Source, check_caption, digest, refuse_named_split
from datasets_lib.sources.classes import class_folders, class_names, number_classes
from datasets_lib.sources.metadata import METADATA_FILES, Listed, find_metadata, read_metadata, read_pairs

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def build(args: Any, split: str) -> ImageDataset:
    """Build the data set of `args.train_data_dir`; a named validation split is the sub-folder of that name.

    Captions come from metadata.jsonl or metadata.csv, else from .txt files with the images' names. Without metadata,
    first-level sub-folders are classes if there are two or more and every image is in one. Hidden files are ignored.
    """
    if args.image_column is not None:
        raise InputError(
            f"base.image_column is {args.image_column!r}, but base.train_data_dir has no such columns; unset it, "
            "or load the folder with base.dataset_name"
        )
    top = resolved(args.train_data_dir)
    is_list = top.suffix == ".jsonl" and top.is_file()
    return ImageDataset(read_list(top, args) if is_list else read_source(top, args, split), args, split)


def read_list(file: Path, args: Any) -> Source:
    """Return what a JSON-lines file lists."""
    refuse_named_split(args, f"base.train_data_dir={file}")
    listed = read_pairs(file, args)
    label_names = class_names(listed.classes)
    notes = [_class_note(str(file), label_names)] if label_names else []
    labels = number_classes(listed.classes, label_names, file.parent)
    return as_source(listed, file.parent, labels, label_names, notes)


def read_source(top: Path, args: Any, split: str) -> Source:
    """Return the images, captions, labels and masks of a split of a folder."""
    if not top.is_dir():
        raise MissingFileError(
            f"base.train_data_dir: there is no folder {top}; give a folder that holds images, or a .jsonl file that "
            "lists them"
        )
    folder, excluded = split_folder(top, args.validation_split, split)
    found, others = list_files(folder, excluded, top, args.allow_outside)
    metadata = find_metadata(folder, top, args.allow_outside)
    if metadata is not None:
        listed = read_metadata(metadata, folder, excluded, found, args)
    else:
        for option in ("label_column", "mask_column"):
            if (column := getattr(args, option)) is not None:
                raise InputError(f"base.{option} is {column!r}, but there is no metadata in {top}; unset it")
        captions = read_text_files(found, others, args.caption_column)
        listed = Listed(found, captions, class_folders(folder, found), None)
    images, classes = listed.images, listed.classes
    if split == "validation" and isinstance(args.validation_split, str):
        # A held-out folder may lack a class, so the numbers are always those of the training folder.
        training = read_source(top, args, "train")
        label_names = training.label_names
        if metadata is None and label_names is not None:
            classes = [image.relative_to(folder).parts[0] for image in images]
        if training.labels is not None and classes is None:
            raise InputError(f"the images in {folder} have no classes, and those to train on have; give them classes")
    else:
        label_names = class_names(classes)
    labels = number_classes(classes, label_names, folder)
    origin = "sub-folders" if metadata is None else metadata.name
    notes = [_class_note(f"the {origin} of {folder}", label_names)] if label_names else []
    left_out = len(set(found) - set(images) - set(listed.masks or ()))
    if metadata is not None and left_out:
        notes.append(f"{left_out} of {len(found)} images in {folder} are not in {metadata.name}: left out")
    return as_source(listed, folder, labels, label_names, notes)


def _class_note(origin: str, names: list[str]) -> str:
    return f"classes from {shown(origin)}: {', '.join(map(shown, names))}"


def as_source(
    listed: Listed, folder: Path, labels: list[int] | None, label_names: list[str] | None, notes: list[str]
) -> Source:
    """Return the images of a folder as rows; their paths below it and their sizes are its fingerprint."""
    masks = [] if listed.masks is None else [name_and_size(mask, folder) for mask in listed.masks]
    files = [name_and_size(image, folder) for image in listed.images]
    fingerprint = digest(files, labels, listed.captions, *masks)
    return Source(
        listed.images, str(folder), fingerprint, labels, label_names, listed.captions, notes, masks=listed.masks
    )


def name_and_size(path: Path, folder: Path) -> tuple[str, int]:
    """Return the path below a folder and the size in bytes, but no time: a copied folder is the same data.

    Raises OSError for what is no regular file.
    """
    # a mask may be outside the folder of a split
    return Path(os.path.relpath(path, folder)).as_posix(), check_regular(path).stat().st_size


def split_folder(top: Path, validation_split: Any, split: str) -> tuple[Path, Path | None]:
    """Return the folder of a split, and the sub-folder to leave out of it."""
    if not isinstance(validation_split, str):
        return top, None
    folders = sorted(path.name for path in top.iterdir() if path.is_dir() and path.name != "train")
    held_out = top / one_of(f"base.validation_split (a sub-folder of {top})", validation_split, folders)
    if split == "validation":
        return held_out, None
    return (top / "train", None) if (top / "train").is_dir() else (top, held_out)


def list_files(
    folder: Path, excluded: Path | None, top: Path, outside: Sequence[str], option: str = "train_data_dir"
) -> tuple[list[Path], list[Path]]:
    """Return the images and the other files below a folder, in order; raise InputError if there are no images."""
    files = list(walk(folder, excluded, top, outside))
    images = [path for path in files if path.suffix.lower() in EXTENSIONS]
    others = [path for path in files if path.suffix.lower() not in EXTENSIONS]
    if not images:
        raise InputError(
            f"there are no images in {folder}: looked there and in its sub-folders for {', '.join(EXTENSIONS)} and saw "
            f"{len(others)} other files; check base.{option}"
        )
    return images, others


def walk(folder: Path, excluded: Path | None, top: Path, outside: Sequence[str] = ()) -> Iterator[Path]:
    """Yield the files below a folder in order, except hidden ones; ValueError for a link that leads out of `top`.

    A link to a folder in `top` is not followed, as its files come anyway; one to a folder below `outside` is.
    """
    waiting, seen = [folder], set()
    while waiting:  # os.walk of Python 3.11 calls itself for each level
        parent = waiting.pop()
        if parent.is_symlink():
            check_inside(parent, top, outside)
        files, folders = [], []
        for path, is_folder, is_link in _entries(parent):
            if path == excluded:
                continue
            if is_link:
                check_inside(path, top, outside)
            if not is_folder:
                files.append(path)
            elif not is_link:
                folders.append(path)
            elif not is_inside(path, [top]) and (target := path.resolve()) not in seen:  # links may lead in a circle
                seen.add(target)
                folders.append(path)
        yield from files
        waiting += reversed(folders)


def _entries(folder: Path) -> list[tuple[Path, bool, bool]]:
    """The files and folders in a folder that are not hidden: whether each leads to a folder, and whether it is a link.

    A folder that this user may not list has none.
    """
    try:
        with os.scandir(folder) as entries:
            found = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError:
        return []
    return [(Path(entry.path), _is_folder(entry), entry.is_symlink()) for entry in found]


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle
        return False


def read_text_files(images: list[Path], others: list[Path], caption_column: str | None) -> list[str | list[str]] | None:
    """Return the text in the .txt file of each image, or None if no image has one."""
    if caption_column is not None:
        raise InputError(
            f"base.caption_column is {caption_column!r}, but there is no {' or '.join(METADATA_FILES)} next to "
            f"{shown(images[0])} or above it; add one, or unset the option"
        )
    texts = {path.with_suffix(""): path for path in others if path.suffix == ".txt"}
    if not any(image.with_suffix("") in texts for image in images):
        return None
    captions = []
    for image in images:
        text = None
        if (path := texts.get(image.with_suffix(""))) is not None:
            with open_text(path, TEXT_BYTES) as file:
                text = file.read().strip()
        captions.append(check_caption(text, f"image {shown(image)} (its text file: {shown(image.stem)}.txt)"))
    return captions
