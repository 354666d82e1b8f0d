"""Remembers hashes of files, so that a start need not read again what has not changed since the one before."""

from __future__ import annotations

import hashlib
import json
import time
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from datasets_lib.foreign import check_regular

FILE = "hashes.jsonl"
SETTLED = 2.0  # seconds after a change; within them another one could leave the times as they are
DIGEST_BYTES = 32  # of a sha256


def cache_directory(args: Any) -> Path:
    """Return the folder of the run's caches on disk."""
    return Path(args.encoder_cache_dir or Path(args.output_dir).parent / "encoder-cache")


def sha256(path: Path) -> str:
    """Return the hash of a regular file."""
    with check_regular(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class FileHashes:
    """Hashes by path, size and the times of the last changes, in a file that several processes may add lines to.

    The time of the last change of the inode is among them, as programs that edit a picture can restore the other one.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE

    def __reduce__(self) -> tuple[Any, ...]:  # what was read need not travel to workers
        return FileHashes, (self.path.parent,)

    @cached_property
    def known(self) -> dict[str, list[Any]]:
        """[size, times, hash] by path; lines that are not whole are left out."""
        found: dict[str, list[Any]] = {}
        with suppress(OSError, UnicodeDecodeError):
            for line in check_regular(self.path).read_text(encoding="utf-8").splitlines():
                with suppress(ValueError, TypeError, RecursionError):
                    name, *rest = json.loads(line)
                    if len(rest) == 4 and len(bytes.fromhex(rest[-1])) == DIGEST_BYTES:
                        found[name] = rest
        return found

    def sha256(self, path: Path) -> str:
        """Return the hash of a regular file, read if it is new or has changed."""
        name, about = str(path.absolute()), path.stat()
        key = [about.st_size, about.st_mtime_ns, about.st_ctime_ns]
        if name in self.known and self.known[name][:3] == key:
            return self.known[name][3]
        digest = sha256(path)
        if time.time() - max(about.st_mtime, about.st_ctime) > SETTLED:
            self.known[name] = [*key, digest]
            with suppress(OSError):  # a disk that is full, or not ours to write
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps([name, *key, digest]) + "\n")
        return digest
