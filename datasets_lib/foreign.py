"""Names, texts and files that come from others: how they are shown, opened and read."""

from __future__ import annotations

import importlib
import json
import os
import stat
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from datasets_lib.errors import FileError, InputError, MissingFileError, UserError

SHOWN_CHARACTERS = 1000
KINDS = {
    stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}  # fmt: skip


def shown(text: object) -> str:
    """Returns a text in one line for messages: control characters escaped, the end of a very long one left out.

    An escape sequence could rename the terminal's window, and a line feed could fake a message of ours.
    """
    short = str(text)
    if len(short) > SHOWN_CHARACTERS:
        short = f"{short[:SHOWN_CHARACTERS]}... ({len(short):,} characters)"
    return _escaped(short)


def shown_lines(text: object) -> str:
    """Returns a message of several lines with all other control characters escaped, for where messages are printed."""
    return "\n".join(map(_escaped, str(text).split("\n")))


def in_quotes(text: object) -> str:
    """Returns a text as it stands between double quotes in a line of Python."""
    return json.dumps(str(text), ensure_ascii=False)[1:-1]


def _escaped(text: str) -> str:
    if text.isprintable():  # nearly always, and at once
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def entries(folder: Path) -> list[Path]:
    """Lists what is in a folder, in order; raises FileError if that may not be read."""
    with reading(folder):
        return sorted(folder.iterdir())


def composed(name: Path | str) -> str:
    """Returns a name in one of the Unicode forms in which its accents may be written."""
    text = str(name)
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def is_folder(path: Path) -> bool:
    """Whether a path leads to a folder; raises FileError where that cannot be known, such as in a locked folder."""
    with reading(path):
        return path.is_dir()


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what the system says about a path that it cannot read into a FileError, or a MissingFileError."""
    try:
        yield
    except UserError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        link = " that its link leads to" if os.path.islink(path) else ""
        raise MissingFileError(f"{shown(path)}: there is no such file{link}; check the name") from None
    except OSError as error:
        advice = "; check its permissions" if isinstance(error, PermissionError) else ""
        raise FileError(f"{shown(path)}: cannot be read ({error.strerror or error}){advice}") from None


def check_regular(path: Path) -> Path:
    """Returns the path of a regular file, as regular_size does its size."""
    regular_size(path)
    return path


def regular_size(path: Path) -> int:
    """Returns the bytes of a regular file; opening a pipe would wait for ever, and a device may have no end.

    Raises MissingFileError if it is not there, and FileError for anything else.
    """
    with reading(path):
        found = os.stat(path)
    kind = stat.S_IFMT(found.st_mode)
    if kind != stat.S_IFREG:
        raise FileError(f"{shown(path)}: is {KINDS.get(kind, 'something else')}, not a regular file; remove it")
    return found.st_size


def read_bytes(path: Path, limit: int) -> bytes:
    """Reads a regular file of at most `limit` bytes; raises OSError for others, ValueError for a larger one."""
    check_regular(path)
    with reading(path), path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise InputError(f"{shown(path)}: has {path.stat().st_size:,} bytes, and at most {limit:,} are read")
    return data


def read_json(path: Path, limit: int) -> Any:
    """Reads a JSON file of at most `limit` bytes; raises OSError, or ValueError for one that is no JSON."""
    data = read_bytes(path, limit)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:  # json's own errors are ValueErrors
        raise InputError(f"{shown(path)}: cannot be read as JSON ({shown(error)})") from None


def named_object(name: str) -> Any:
    """Imports "package.module:name" and returns the object; raises ImportError, AttributeError or ValueError.

    Whether it may be imported is decided before. A folder without __init__.py is no package here: any folder of runs
    or data beside train.py would be one.
    """
    module, colon, attribute = name.partition(":")
    if not colon:
        raise InputError("it has no colon")
    package = module.partition(".")[0]
    found = None if package in sys.modules else find_spec(package)  # __main__, or a module made in a notebook
    if found is not None and found.origin is None:
        raise ImportError(f"the folder {package} has no __init__.py; add an empty one")
    return getattr(importlib.import_module(module), attribute)
