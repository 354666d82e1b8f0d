"""A checkpoint folder is complete if its name is checkpoint-N and its manifest lists each file's size and SHA-256."""

from __future__ import annotations

import re
from pathlib import Path

from datasets_lib.errors import InputError
from datasets_lib.file_hashes import sha256
from datasets_lib.foreign import read_json, shown
from trainers.engine.checkpoint.state_file import STATE, OtherVersion, read_state_file
from trainers.engine.run.run_folder import CHECKPOINT_NAME

MANIFEST = "manifest.json"
MOST_BYTES = 256 << 20  # of the manifest: a million files
SUFFIXES = {".json", ".safetensors"}  # of every file of a checkpoint; neither can run code when loaded
IGNORED = re.compile(r"\.DS_Store|\.nfs|\._")  # files of operating systems, which are never loaded


class DamagedCheckpoint(InputError):
    """A checkpoint whose manifest is missing or does not match its files."""


def verify(folder: Path) -> None:
    """Raises DamagedCheckpoint if a file is missing, differs from the manifest, or does not belong in a checkpoint.

    Raises ValueError for a checkpoint of another version of diffloop.
    """
    try:
        manifest = _read(folder)
        there = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()}
        strange = sorted(name for name in there - {*manifest, MANIFEST} if not IGNORED.match(Path(name).name))
        strange += [name for name in manifest if Path(name).suffix not in SUFFIXES]
        if strange:
            raise DamagedCheckpoint(
                f"{folder} holds {shown(strange[0])}, which diffloop does not write there; it could run code if loaded"
            )
        for name, (size, digest) in manifest.items():
            path = folder / name
            if not path.resolve().is_relative_to(folder.resolve()):
                raise DamagedCheckpoint(f"{folder}: its manifest names {shown(name)}, which is outside of it")
            if not path.is_file() or path.stat().st_size != size or sha256(path) != digest:
                raise DamagedCheckpoint(f"{folder}: {shown(name)} is missing or not what was written")
        if STATE not in manifest:
            raise DamagedCheckpoint(f"{folder}: its manifest does not name {STATE}")
        read_state_file(folder)
    except (DamagedCheckpoint, OtherVersion):
        raise
    except (OSError, ValueError, MemoryError) as error:
        raise DamagedCheckpoint(f"{folder} is damaged: {shown(error)}") from None


def _read(folder: Path) -> dict[str, tuple[int, str]]:
    """Reads the manifest; raises OSError or ValueError if it is not one."""
    path = folder / MANIFEST
    if path.is_symlink():
        raise InputError(f"{MANIFEST} is a link")
    manifest = read_json(path, MOST_BYTES)
    if not isinstance(manifest, dict):
        raise InputError(f"{MANIFEST} holds no mapping")
    for name, entry in manifest.items():
        if not (isinstance(entry, list) and [type(each) for each in entry] == [int, str] and "\0" not in name):
            raise InputError(f"{MANIFEST} has {shown(name)}: {shown(entry)}, not a size and a hash")
    return {name: (size, digest) for name, (size, digest) in manifest.items()}


def tensor_digests(folder: Path) -> dict[str, str]:
    """Returns the hashes of a verified checkpoint's tensor files, which are equal in all copies of a checkpoint."""
    return {name: digest for name, (_, digest) in _read(folder).items() if name.endswith(".safetensors")}


def list_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """Lists (step, folder) of everything named checkpoint-N, newest first, without symbolic links."""
    if not output_dir.is_dir():
        return []
    found = [
        (CHECKPOINT_NAME.fullmatch(path.name), path)
        for path in output_dir.iterdir()
        if path.is_dir() and not path.is_symlink()
    ]
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)
