"""Finds out which processes share a folder, with a file that each leaves there, as equal paths do not prove it."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import gather_object

from datasets_lib.errors import FileError
from trainers.engine.distributed.collectives import run_on_all, run_on_ranks

PROBE = ".probe-"
Result = TypeVar("Result")


@dataclass(frozen=True)
class Folders:
    """The folders behind a path: one that all processes see, or several, each seen by some of them.

    Tuples are by process; `owners` holds the lowest process that sees the same folder, the only one to write there.
    """

    accelerator: Accelerator
    hosts: tuple[str, ...]
    paths: tuple[str, ...]
    owners: tuple[int, ...]

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def mains(self) -> list[int]:
        return sorted(set(self.owners))

    @property
    def several(self) -> bool:
        return len(self.mains) > 1

    @property
    def is_main(self) -> bool:
        return self.owners[self.rank] == self.rank

    @property
    def number(self) -> int:
        """Position of this folder's main process in `mains`."""
        return self.mains.index(self.owners[self.rank])

    @property
    def sharing(self) -> list[int]:
        """The processes that see this one's folder."""
        return [rank for rank, owner in enumerate(self.owners) if owner == self.owners[self.rank]]

    @property
    def places(self) -> list[str]:
        """HOST:FOLDER of each folder, by its main process."""
        return [f"{self.hosts[rank]}:{self.paths[rank]}" for rank in self.mains]

    def on_mains(self, action: Callable[[], Result]) -> list[Result]:
        """Runs an action on each folder's main process; all ranks return the results or raise an error. Collective."""
        where = f"on {self.hosts[self.rank]}: " if self.several else ""
        return run_on_ranks(self.accelerator, self.mains, action, where)


def find_folders(accelerator: Accelerator, path: Path, option: str) -> Folders:
    """Creates each process's folder `path`, and finds out which of them are the same. Collective."""
    token = path / f"{PROBE}{secrets.token_hex(8)}"
    try:
        run_on_all(accelerator, lambda: _leave(token, option))
        found = gather_object([(socket.gethostname(), str(path.absolute()), token.name)])
        hosts, paths, names = zip(*found, strict=True)
        # by new names: a network file system may cache a folder's listing, but not names that were never asked for
        seen = gather_object([tuple(rank for rank, name in enumerate(names) if (path / name).exists())])
    finally:
        with suppress(OSError):
            token.unlink()
    folders = Folders(accelerator, hosts, paths, tuple(min(ranks, default=-1) for ranks in seen))
    _check(folders, seen, option)
    return folders


def _leave(token: Path, option: str) -> None:
    try:
        token.parent.mkdir(parents=True, exist_ok=True)
        token.touch()
    except OSError as error:
        raise FileError(f"{option} = {token.parent}: cannot be written ({error}); choose another folder") from None


def _check(folders: Folders, seen: list[tuple[int, ...]], option: str) -> None:
    for rank, theirs in enumerate(seen):
        place = f"process {rank} on {folders.hosts[rank]}"
        if rank not in theirs:
            raise FileError(
                f"{option} = {folders.paths[rank]}: what {place} wrote there is gone at once; wait for another run "
                "that starts in this folder, or choose another one"
            )
        other = next((each for each in theirs if seen[each] != theirs), None)
        if other is not None:
            raise FileError(
                f"{option} = {folders.paths[rank]}: {place} sees there what the processes {list(theirs)} wrote, and "
                f"process {other} on {folders.hosts[other]} what {list(seen[other])} wrote; mount one folder on all "
                "hosts, or give each host its own folder"
            )
