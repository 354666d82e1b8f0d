"""`train_data_dir`: images in a folder, with captions from metadata or text files, or labels from sub-folders."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets_lib.choices import one_of
from datasets_lib.dataset import ImageDataset
from datasets_lib.metadata import METADATA_FILES, find_metadata, read_metadata
from datasets_lib.source import Source, check_caption, digest

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def build(args: Any, split: str) -> ImageDataset:
    """Build the data set of `args.train_data_dir`; a named validation split is the sub-folder of that name.

    Captions come from metadata.jsonl or metadata.csv, else from a .txt file beside each image. Without metadata, the
    first-level sub-folders are classes if there are two or more and every image lies in one. Hidden files are ignored.
    """
    if args.image_column is not None:
        raise ValueError(
            f"base.image_column is {args.image_column!r}, but base.train_data_dir has no such columns; unset it, "
            "or load the folder with base.dataset_name"
        )
    return ImageDataset(read_source(args, split), args, split)


def read_source(args: Any, split: str) -> Source:
    """Return the images, captions and labels of a split."""
    top = Path(args.train_data_dir).expanduser().resolve()
    if not top.is_dir():
        raise FileNotFoundError(f"base.train_data_dir: there is no folder {top}; give a folder that holds images")
    folder, excluded = split_folder(top, args.validation_split, split)
    found, others = list_files(folder, excluded, top)
    metadata = find_metadata(folder, top)
    if metadata is not None:
        images, captions, classes = read_metadata(metadata, folder, excluded, found, args)
    else:
        if args.label_column is not None:
            raise ValueError(f"base.label_column is {args.label_column!r}, but there is no metadata in {top}; unset it")
        images, captions = found, read_text_files(found, others, args.caption_column)
        classes = class_folders(folder, images)
    if split == "validation" and isinstance(args.validation_split, str):
        # A held-out folder may lack a class, so the numbers are always those of the training folder.
        training = read_source(args, "train")
        label_names = training.label_names
        if metadata is None and label_names is not None:
            classes = [image.relative_to(folder).parts[0] for image in images]
        if training.labels is not None and classes is None:
            raise ValueError(f"the images in {folder} have no classes, and those to train on have; give them classes")
    else:
        label_names = class_names(classes)
    labels = number_classes(classes, label_names, folder)
    origin = "sub-folders" if metadata is None else metadata.name
    notes = [f"classes from the {origin} of {folder}: {', '.join(label_names)}"] if label_names else []
    if left_out := len(found) - len(set(images)):
        notes.append(f"{left_out} of {len(found)} images in {folder} are not in {metadata.name}: left out")
    # Sizes but no modification times: a copied folder is the same data.
    files = [(image.relative_to(folder).as_posix(), image.stat().st_size) for image in images]
    fingerprint = digest(files, labels, captions)
    return Source(images, str(folder), fingerprint, labels, label_names, captions, notes)


def split_folder(top: Path, validation_split: Any, split: str) -> tuple[Path, Path | None]:
    """Return the folder of a split, and the sub-folder to leave out of it."""
    if not isinstance(validation_split, str):
        return top, None
    folders = sorted(path.name for path in top.iterdir() if path.is_dir() and path.name != "train")
    held_out = top / one_of(f"base.validation_split (a sub-folder of {top})", validation_split, folders)
    if split == "validation":
        return held_out, None
    return (top / "train", None) if (top / "train").is_dir() else (top, held_out)


def list_files(folder: Path, excluded: Path | None, top: Path) -> tuple[list[Path], list[Path]]:
    """Return the images and the other files below a folder, in order; raise ValueError if there are no images."""
    files = list(_walk(folder, excluded, top))
    images = [path for path in files if path.suffix.lower() in EXTENSIONS]
    others = [path for path in files if path.suffix.lower() not in EXTENSIONS]
    if not images:
        raise ValueError(
            f"there are no images in {folder}: looked there and in its sub-folders for {', '.join(EXTENSIONS)} and saw "
            f"{len(others)} other files; check base.train_data_dir"
        )
    return images, others


def _walk(folder: Path, excluded: Path | None, top: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and Path(parent, name) != excluded)
        files = [Path(parent, name) for name in sorted(names) if not name.startswith(".")]
        for path in (Path(parent), *(Path(parent, name) for name in folders), *files):
            if path.is_symlink() and not path.resolve().is_relative_to(top):
                raise ValueError(f"{path} is a link that leads out of {top}; copy its files into the folder instead")
        yield from files


def read_text_files(images: list[Path], others: list[Path], caption_column: str | None) -> list[str] | None:
    """Return the text beside each image, or None if no image has one."""
    if caption_column is not None:
        raise ValueError(
            f"base.caption_column is {caption_column!r}, but there is no {' or '.join(METADATA_FILES)} beside "
            f"{images[0]} or above it; add one, or unset the option"
        )
    texts = {path.with_suffix(""): path for path in others if path.suffix == ".txt"}
    if not any(image.with_suffix("") in texts for image in images):
        return None
    captions = []
    for image in images:
        path = texts.get(image.with_suffix(""))
        text = None if path is None else path.read_text(encoding="utf-8").strip()
        captions.append(check_caption(text, f"image {image} (its text file: {image.stem}.txt)"))
    return captions


def class_folders(folder: Path, images: list[Path]) -> list[str] | None:
    """Return each image's first-level sub-folder, if these look like classes."""
    parts = [image.relative_to(folder).parts for image in images]
    looks_so = len({first for first, *_ in parts}) >= 2 and all(len(part) > 1 for part in parts)
    return [first for first, *_ in parts] if looks_so else None


def class_names(classes: list[str | int] | None) -> list[str] | None:
    """Return the names in order, numbers by their value; None where classes are integers already."""
    if classes is None or all(isinstance(item, int) for item in classes):
        return None
    names = {str(item) for item in classes}
    numbered = all(name.isdecimal() for name in names)
    return sorted(names, key=lambda name: (int(name), name)) if numbered else sorted(names)


def number_classes(classes: list[str | int] | None, label_names: list[str] | None, folder: Path) -> list[int] | None:
    """Return the number of each image's class."""
    if classes is None:
        return None
    if label_names is None:  # the training set's classes are numbers
        for item in classes:
            if not str(item).isdecimal():
                raise ValueError(f"the class of an image in {folder} is {item!r}; those to train on have numbers")
        return [int(item) for item in classes]
    for name in sorted({str(item) for item in classes}):
        one_of(f"the class of an image in {folder}", name, label_names)
    numbers = {name: number for number, name in enumerate(label_names)}
    return [numbers[str(item)] for item in classes]
