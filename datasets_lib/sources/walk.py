"""The files below a folder, in order: pictures, and all others."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from datasets_lib.errors import InputError
from datasets_lib.foreign import shown
from datasets_lib.images.files import check_inside, is_inside
from datasets_lib.images.formats import EXTENSIONS, HEIF, is_picture

# made by systems and programs: thumbnails, bins, snapshots
SYSTEM_FOLDERS = {
    "@eadir", "@__thumb", "@recycle", "@recently-snapshot", "@sharebin", "@synoresource", "@tmp", "#recycle",
    "#snapshot", "$recycle.bin", "recycler", "system volume information", "lost+found", "__macosx", "__pycache__",
    "network trash folder", "temporary items",
}  # fmt: skip
SHARDS = (".parquet", ".arrow", ".tar")
ENDINGS_SHOWN = 8
COMMON = f".jpg, .png, .webp, .gif, .bmp, .tif, .avif and {len(EXTENSIONS) - 7} other endings"


class Listing(NamedTuple):
    """The pictures below a folder, and all other files."""

    images: list[Path]
    others: list[Path]


def list_files(
    folder: Path, excluded: Path | None, top: Path, outside: Sequence[str], option: str = "train_data_dir"
) -> Listing:
    """Return the pictures and the other files below a folder, in order; raise InputError if there are no pictures."""
    files = walk(folder, excluded, top, outside)
    images: list[Path] = []
    others: list[Path] = []
    for path in files:
        (images if is_picture(path.name) else others).append(path)
    if not images:
        raise InputError(
            f"there are no images in {folder}: looked there and in its sub-folders for {COMMON} and saw "
            f"{by_ending(others) or 'no other files'}; {_advice(folder, others, option)}"
        )
    return Listing(images, others)


def _advice(folder: Path, others: list[Path], option: str) -> str:
    kinds = {path.suffix.lower() for path in others}
    if kinds & {".parquet", ".arrow"} and option == "train_data_dir":
        return (
            f"base.dataset_name={folder} instead of base.train_data_dir reads a hub data set's layout, and "
            "base.streaming=true shards one after the other"
        )
    if ".tar" in kinds and option == "train_data_dir":
        return "base.streaming=true reads .tar files"
    return f"check base.{option}"


def by_ending(files: Iterable[Path]) -> str:
    """Counts files by the ends of their names, such as "3 .heic, 1 .mp4"; empty for none."""
    counts = Counter(path.suffix.lower() or "without an ending" for path in files).most_common()
    shown_counts = [f"{count:,} {shown(ending)}{_remedy(ending)}" for ending, count in counts[:ENDINGS_SHOWN]]
    rest = sum(count for _, count in counts[ENDINGS_SHOWN:])
    return ", ".join([*shown_counts, *([f"{rest:,} of other kinds"] if rest else [])])


def _remedy(ending: str) -> str:
    return " (pip install diffloop[heif] reads them)" if ending in HEIF else ""


def walk(folder: Path, excluded: Path | None, top: Path, outside: Sequence[str] = ()) -> Iterator[Path]:
    """Yield the files below a folder in order, except hidden ones and those of SYSTEM_FOLDERS.

    Raises InputError for a link that leads out of `top`. A link to a folder in `top` is not followed, as its files come
    anyway; one to a folder below `outside` is.
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
    """The files and folders in a folder that are no system's: whether each leads to a folder, and whether it is a link.

    A folder that this user may not list has none.
    """
    try:
        with os.scandir(folder) as entries:
            found = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError:
        return []
    listed = [(Path(entry.path), _is_folder(entry), entry.is_symlink()) for entry in found]
    return [item for item in listed if not (item[1] and item[0].name.lower() in SYSTEM_FOLDERS)]


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle
        return False
