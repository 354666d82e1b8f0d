"""Files of a cache: rows of tensors by key, with a checksum for each that shows damage."""

from __future__ import annotations

import math
import os
import secrets
import shutil
import stat
import zlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from datasets_lib.errors import FileError, InputError
from datasets_lib.foreign import shown
from trainers.engine.run.files import flush
from trainers.weight_files import write_tensors

CHECKSUMS = "checksums"  # the tensor [rows], int64, of each file, in the order of the keys


def checksum(key: str, row: Sequence[Tensor]) -> int:
    """Returns a CRC of a row and its key.

    It finds damage, and no forgery: whoever can write a row could write any hash beside it, and this one is fast.
    """
    found = zlib.crc32(key.encode())
    for column in row:
        found = zlib.crc32(f"{column.dtype} {list(column.shape)}".encode(), found)
        found = zlib.crc32(column.contiguous().reshape(-1).view(torch.uint8).numpy().data, found)
    return found


def write_rows(folder: Path, rows: dict[str, list[Tensor]]) -> None:
    """Writes a file, which is flushed before it gets its name; OSError if it cannot be written."""
    token = secrets.token_hex(8)
    staged = folder / f".tmp-{token}"
    tensors = {f"{key}.{n}": row.contiguous() for key, each in rows.items() for n, row in enumerate(each)}
    needed = sum(row.nbytes for row in tensors.values())
    tensors[CHECKSUMS] = torch.tensor([checksum(key, rows[key]) for key in sorted(rows)])
    try:
        write_tensors(tensors, staged)
        flush(staged)
        staged.rename(folder / f"rows-{token}.safetensors")
        flush(folder)
    except OSError as error:
        staged.unlink(missing_ok=True)
        space = f"it needs {needed:,} bytes, {shutil.disk_usage(folder).free:,} are free"
        raise FileError(f"{folder}: a cache cannot be written ({error}); {space}; what is there stays") from None


class RowsFile:
    """An open file; ValueError if it is none that `write_rows` has written, OSError if it cannot be opened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.open("rb").close()  # safetensors reports every error as a missing file
        try:
            self.file = safe_open(path, framework="pt")
            numbers: dict[str, set[str]] = defaultdict(set)
            for name in self.file.keys():  # noqa: SIM118  # not a dict
                key, _, number = name.partition(".")
                numbers[key].add(number)
            numbers.pop(CHECKSUMS, None)
            checksums = self.file.get_tensor(CHECKSUMS)
        except SafetensorError as error:
            raise InputError(shown(error)) from None
        self.counts = {key: len(found) for key, found in sorted(numbers.items())}
        for key, found in numbers.items():
            if found != {str(number) for number in range(len(found))}:
                raise InputError(f"row {shown(key)} is not whole")
        if checksums.dtype != torch.int64 or checksums.shape != (len(numbers),):
            raise InputError("it has no checksum for each row")
        self.checksums = dict(zip(self.counts, checksums.tolist(), strict=True))

    def row(self, key: str) -> list[Tensor]:
        return [self.file.get_tensor(f"{key}.{number}") for number in range(self.counts[key])]

    def damage(self, key: str, row: Sequence[Tensor]) -> str | None:
        """Says what is wrong with a row that was read, or returns None."""
        if checksum(key, row) != self.checksums[key]:
            return "is damaged, as its checksum shows"
        # a sum is fast, and only where it overflows the exact question follows
        if not all(math.isfinite(column.sum(dtype=torch.float32)) or column.isfinite().all() for column in row):
            return "holds numbers that are not finite: it is damaged, or the encoder overflows in this precision"
        return None

    def remove(self) -> str:
        """Removes the file, if that is allowed; returns what was done, for messages."""
        return remove(self.path)


def remove(path: Path) -> str:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return "left out, and cannot be removed"
    return "removed, and encoded again"


def others(folder: Path) -> str | None:
    """Says which part of a cache others than this user and root can change, or returns None.

    Groups count as this user: a cache that a group shares is made on purpose, and many systems' usual permissions
    let a user's group write.
    """
    for path in (folder.parent, folder, *sorted(folder.glob("rows-*.safetensors"))):
        if path.is_symlink() and path.suffix:  # a rows file that is left out
            continue
        found = path.stat()
        if found.st_uid not in (0, os.geteuid()):
            return f"{shown(path)} belongs to user {found.st_uid}"
        if found.st_mode & stat.S_IWOTH and not (path.is_dir() and found.st_mode & stat.S_ISVTX):
            return f"{shown(path)} can be written by everybody"
    return None
