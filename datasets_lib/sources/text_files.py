"""Captions in text files beside the pictures: a.txt or a.caption, or a.png.txt, for a.png."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from datasets_lib.errors import InputError
from datasets_lib.foreign import composed, shown
from datasets_lib.images.files import TEXT_BYTES, open_text
from datasets_lib.images.source import check_caption
from datasets_lib.sources.metadata import METADATA_FILES
from datasets_lib.sources.walk import by_ending

ENDINGS = (".txt", ".caption")  # of an image's files the first is read
TABLES = (".jsonl", ".csv", ".tsv", ".parquet", ".json", ".xlsx")
WORDS = ("caption", "prompt", "metadata", "tags", "meta_", "annotation", "labels", "dataset", "descriptions")
NO_CAPTIONS = (".npz", ".npy", ".safetensors", ".pt", ".html", ".url")  # other programs' caches and notes
ABOUT = ("readme", "license", "licence", "copying", "notice", "notes", "info", "changelog", "requirements", "credits")


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
    read = {path for path in files if path is not None}
    names = _names(images)
    second = [path for key, path in _text_files(others) if path not in read and key in names]
    notes = []
    if second:
        notes.append(f"{len(second):,} text files such as {shown(second[0])} are not read: another one comes first")
    if fallback is not None and not read and (unread := unread_files(images, others)):
        notes.append(f"not read, though it looks like captions: {', '.join(unread)}")
    return captions, notes


def _files_of(images: list[Path], found: dict[str, Path]) -> list[Path | None]:
    """The text file of each image: a.png.txt or a.txt."""
    return [found.get(composed(image)) or found.get(composed(image.with_suffix(""))) for image in images]


def _names(images: list[Path]) -> set[str]:
    """The names that an image's text file may have, without its ending."""
    return {composed(image.with_suffix("")) for image in images} | set(map(composed, images))


def count_text_files(images: list[Path], others: list[Path]) -> int:
    """How many images have a text file."""
    found = caption_files(others)
    return sum(path is not None for path in _files_of(images, found)) if found else 0


def caption_files(others: list[Path]) -> dict[str, Path]:
    """The text files by their names without the ending, in one Unicode form; .txt comes before .caption."""
    return dict(reversed(list(_text_files(others))))


def _text_files(others: list[Path]) -> Iterator[tuple[str, Path]]:
    for ending in ENDINGS:
        for path in others:
            if path.suffix.lower() == ending:
                yield composed(str(path)[: -len(ending)]), path


def _read(path: Path, lines: bool) -> str | list[str] | None:
    with open_text(path, TEXT_BYTES) as file:
        text = file.read().strip()
    return [line.strip() for line in text.splitlines() if line.strip()] or None if lines else text


def unread_files(images: list[Path], others: list[Path]) -> list[str]:
    """Describes files that look like captions of images that have none, such as "66 .json with the names of images"."""
    names = _names(images)
    beside, called_so, texts = [], [], []
    for path in others:
        ending, name = path.suffix.lower(), path.name.lower()
        if ending not in (*NO_CAPTIONS, *ENDINGS) and composed(path.with_suffix("")) in names:
            beside.append(path)
        elif ending in (*TABLES, ".txt") and any(word in name for word in WORDS):
            called_so.append(path)
        elif ending in ENDINGS and not name.startswith(ABOUT):
            texts.append(path)
    found = [f"{by_ending(beside)} with the names of images ({shown(beside[0])})"] if beside else []
    if 2 * len(texts) >= len(images):
        found.append(f"{by_ending(texts)} with other names than the images ({shown(texts[0])})")
    return found + [shown(path) for path in called_so[:5]]
