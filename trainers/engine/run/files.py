"""Files that survive a crash and have the usual permissions."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from datasets_lib.errors import FileError


@contextmanager
def staged(path: Path, ending: str = "") -> Iterator[Path]:
    """Gives a new name beside `path`, by which a file is written that replaces `path` once it is whole.

    A link at `path` is replaced, and never followed.
    """
    place = path.with_name(f".tmp-{secrets.token_hex(8)}{ending}")
    try:
        yield place
        place.replace(path)
    finally:
        with suppress(OSError):  # there is none in what is no folder
            place.unlink(missing_ok=True)


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a new file that replaces `path` as a staged one does; OSError with the free space if it cannot."""
    try:
        with staged(path) as place:
            descriptor = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            with open(descriptor, "wb") as file:
                yield file
    except OSError as error:
        raise FileError(f"{path} cannot be written: {error}{_space(path)}") from None


def write_text(path: Path, text: str) -> None:
    """Writes a text file as new_file does."""
    with new_file(path) as file:
        file.write(text.encode())


def append_line(path: Path, values: dict[str, Any]) -> None:
    """Adds an object to a JSON-lines file, which is no link; raises OSError with the free space."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        with open(os.open(path, flags, 0o666), "wb") as file:  # buffered: it writes all, or raises
            file.write(f"{json.dumps(values)}\n".encode())
    except OSError as error:
        raise FileError(f"{path} cannot be written: {error}{_space(path)}") from None


def _space(path: Path) -> str:
    try:
        return f"; {shutil.disk_usage(path.parent).free:,} bytes are free"
    except OSError:  # the folder is gone
        return ""


def flush(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Makes a folder and those above it; raises FileError if it cannot, such as for a file in its place."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"{path}: no folder can be made there ({error}); choose another place") from None
