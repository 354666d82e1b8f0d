"""A checkpoint folder is complete if its name is checkpoint-N and its manifest lists each file's size and SHA-256."""

from __future__ import annotations

import json
import re
from pathlib import Path

from trainers.engine.run.files import sha256
from trainers.engine.run.run_folder import CHECKPOINT_NAME

SUFFIXES = {".json", ".safetensors"}  # of every file of a checkpoint; neither can run code when loaded
IGNORED = re.compile(r"\.DS_Store|\.nfs|\._")  # files of operating systems, which are never loaded


class DamagedCheckpoint(ValueError):
    """A checkpoint whose manifest is missing or does not match its files."""


def verify(folder: Path) -> None:
    """Raises DamagedCheckpoint if a file is missing, differs from the manifest, or does not belong in a checkpoint."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        there = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()}
        strange = sorted(name for name in there - {*manifest, "manifest.json"} if not IGNORED.match(Path(name).name))
        strange += [name for name in manifest if Path(name).suffix not in SUFFIXES]
        if strange:
            raise DamagedCheckpoint(
                f"{folder} holds {strange[0]}, which diffloop does not write there; it could run code when loaded"
            )
        for name, (size, digest) in manifest.items():
            path = folder / name
            if not path.resolve().is_relative_to(folder.resolve()):
                raise DamagedCheckpoint(f"{folder}: its manifest names {name}, which is outside of it")
            if not path.is_file() or path.stat().st_size != size or sha256(path) != digest:
                raise DamagedCheckpoint(f"{folder}: {name} is missing or not what was written")
        if "state.json" not in manifest:
            raise DamagedCheckpoint(f"{folder}: its manifest does not name state.json")
    except DamagedCheckpoint:
        raise
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise DamagedCheckpoint(f"{folder} is damaged: {error}") from None


def tensor_digests(folder: Path) -> dict[str, str]:
    """Returns the hashes of a verified checkpoint's tensor files, which are equal in all copies of a checkpoint."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return {name: digest for name, (_, digest) in manifest.items() if name.endswith(".safetensors")}


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
