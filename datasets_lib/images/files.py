"""Files of a data set: where they may be, and how much of one is read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import IO

from datasets_lib.errors import InputError
from datasets_lib.foreign import reading, regular_size, shown

# at most, of what is read into memory at once
PICTURE_BYTES = 64 << 20  # a picture or latents in a shard
TEXT_BYTES = 1 << 20  # a caption, or a line of metadata
PATH_CHARACTERS = 4096
METADATA_BYTES = 1 << 30  # a list of pictures or shards


@contextlib.contextmanager
def open_text(path: Path, limit: int, newline: str | None = None) -> Iterator[IO[str]]:
    """Open a text file; raise FileError for a pipe, ValueError for more than `limit` bytes or what is not UTF-8."""
    if (size := regular_size(path)) > limit:
        raise InputError(f"{shown(path)}: has {size:,} bytes, and at most {limit:,} are read")
    try:
        with reading(path), path.open(encoding="utf-8-sig", newline=newline) as file:
            yield file
    except UnicodeDecodeError as error:
        raise InputError(f"{shown(path)} is not UTF-8 text ({error}); save it as UTF-8") from error


def lines_of(file: IO[str], path: Path) -> Iterator[str]:
    """Yield the lines of a text file; raise InputError for one that is too long to be read into memory."""
    for number, line in enumerate(iter(partial(file.readline, TEXT_BYTES + 1), ""), 1):
        if len(line) > TEXT_BYTES:
            raise InputError(f"line {number} of {shown(path)} has more than {TEXT_BYTES:,} characters; shorten it")
        yield line


def resolved(path: Path | str) -> Path:
    """Return a path in full, its links followed; raise InputError if that cannot be done."""
    if len(str(path)) > PATH_CHARACTERS:
        raise InputError(f"{shown(path)}: cannot be a path; correct or remove it")
    try:
        return Path(path).expanduser().resolve()
    except (ValueError, OSError, RuntimeError) as error:  # a null byte, or links in a circle
        raise InputError(f"{shown(path)}: cannot be a path ({shown(error)}); correct or remove it") from None


def is_inside(path: Path, folders: Iterable[Path | str]) -> bool:
    """Whether a path leads to below one of the folders."""
    target = resolved(path)
    return any(target.is_relative_to(resolved(folder)) for folder in folders)


def check_inside(path: Path, folder: Path, outside: Iterable[str]) -> Path:
    """Return a path that leads to below a folder or one of base.allow_outside; raise InputError for any other."""
    if not is_inside(path, (folder, *outside)):
        raise InputError(
            f"{shown(path)} leads out of {shown(folder)}, as a link or through one; copy it into the folder instead, "
            "or add the folder that it leads to to base.allow_outside"
        )
    return path
