"""Captions in text files beside the pictures: a.txt or a.caption, or a.png.txt, for a.png."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets_lib.errors import InputError
from datasets_lib.foreign import shown
from datasets_lib.images.files import TEXT_BYTES, open_text
from datasets_lib.images.source import check_caption
from datasets_lib.sources.metadata import METADATA_FILES
from datasets_lib.sources.walk import by_ending

ENDINGS = (".txt", ".caption")  # of an image's files the first is read
TABLES = (".jsonl", ".csv", ".tsv", ".parquet", ".json", ".xlsx")
WORDS = ("caption", "prompt", "metadata", "tags")  # in names of files that look like captions
NO_CAPTIONS = (".npz", ".npy", ".safetensors", ".pt", ".html", ".url")  # other programs' caches and notes


def read_text_files(
    images: list[Path], others: list[Path], fallback: Sequence[str] | None, args: Any
) -> tuple[list[str | list[str]] | None, list[str]]:
    """Return the caption of each image, or None if no image has one, and notes; a lacking one is its `fallback`.

    With base.caption_lines each line of a file is a caption. Raises InputError for a file without text.
    """
    if args.caption_column is not None:
        raise InputError(
            f"base.caption_column is {args.caption_column!r}, but there is no {' or '.join(METADATA_FILES)} next to "
            f"{shown(images[0])} or above it; add one, or unset the option"
        )
    found = caption_files(others)
    files = _files_of(images, found)
    if fallback is None and not any(files):
        return None, []
    captions: list[str | list[str]] = []
    for number, (image, path) in enumerate(zip(images, files, strict=True)):
        if path is None and fallback is not None:
            captions.append(fallback[number])
            continue
        text = None if path is None else _read(path, args.caption_lines)
        name = f"{image.stem}.txt" if path is None else path.name
        captions.append(check_caption(text, f"image {shown(image)} (its text file: {shown(name)})"))
    unused = [path for path in others if path.suffix.lower() in ENDINGS and found[_without_ending(path)] != path]
    notes = [f"{len(unused):,} text files such as {shown(unused[0])} are not read: .txt comes first"] if unused else []
    return captions, notes


def _files_of(images: list[Path], found: dict[str, Path]) -> list[Path | None]:
    return [found.get(str(image)) or found.get(str(image.with_suffix(""))) for image in images]


def count_text_files(images: list[Path], others: list[Path]) -> int:
    """How many images have a text file."""
    found = caption_files(others)
    return sum(path is not None for path in _files_of(images, found)) if found else 0


def caption_files(others: list[Path]) -> dict[str, Path]:
    """The text files by their names without the ending: of an image's, or of an image's without its own."""
    found: dict[str, Path] = {}
    for ending in ENDINGS:
        for path in others:
            if path.suffix.lower() == ending:
                found.setdefault(_without_ending(path), path)
    return found


def _without_ending(path: Path) -> str:
    return str(path)[: -len(path.suffix)]


def _read(path: Path, lines: bool) -> str | list[str] | None:
    with open_text(path, TEXT_BYTES) as file:
        text = file.read().strip()
    return [line.strip() for line in text.splitlines() if line.strip()] or None if lines else text


def unread_files(images: list[Path], others: list[Path]) -> list[str]:
    """Describes files that look like captions of images that have none, such as "66 .json with the names of images"."""
    stems = {str(image.with_suffix("")) for image in images} | set(map(str, images))
    beside = [
        path
        for path in others
        if str(path.with_suffix("")) in stems and path.suffix.lower() not in (*NO_CAPTIONS, *ENDINGS)
    ]
    called_so = [
        path
        for path in others
        if path not in beside
        and path.suffix.lower() in (*TABLES, ".txt")
        and any(word in path.name.lower() for word in WORDS)
    ]
    found = []
    if beside:
        found.append(f"{by_ending(beside)} with the names of images ({shown(beside[0])})")
    return found + [shown(path) for path in called_so[:5]]
