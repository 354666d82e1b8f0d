"""The run folder by device and inode: another folder may take its name while the run goes on."""

from __future__ import annotations

import os
from pathlib import Path

from datasets_lib.errors import FileError
from datasets_lib.foreign import shown

DESCRIPTORS = Path("/proc/self/fd")  # of Linux; elsewhere a moved folder counts as deleted


class HeldFolder:
    """A folder kept open from the start of the run to its end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def __enter__(self) -> HeldFolder:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self.descriptor)

    def moved_to(self) -> Path | None:
        """Returns where the folder is now, None for its own path; raises OSError if it was deleted."""
        if self._is(self.path):
            return None
        try:
            moved = Path(os.readlink(DESCRIPTORS / str(self.descriptor)))
        except OSError:
            moved = self.path
        if self._is(moved):
            return moved
        raise FileError(f"base.output_dir = {shown(self.path)}: was deleted during the run; start anew")

    def check(self) -> None:
        """Raises OSError if the folder's path leads elsewhere, or nowhere."""
        if (place := self.moved_to()) is not None:
            raise FileError(
                f"base.output_dir = {shown(self.path)}: was moved to {shown(place)} during the run; continue there"
            )

    def _is(self, path: Path) -> bool:
        try:
            return os.path.samestat(path.stat(), os.fstat(self.descriptor))
        except OSError:
            return False
