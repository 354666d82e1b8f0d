"""Files that survive a crash and have the usual permissions."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def write_tensors(values: dict[str, Tensor], path: Path) -> None:
    """Writes a safetensors file with the usual permissions; the library's own can be read by the owner only."""
    path.touch()
    mode = path.stat().st_mode & 0o777  # asking os.umask() would change it for all threads
    save_file(values, path, metadata={"format": "pt"})
    path.chmod(mode)


def flush(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
