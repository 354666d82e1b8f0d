"""Folders of drawn pictures; a later call with the same folder replaces its own files and no others."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

MARK = ".diffloop.json"  # lists the files that were drawn into a folder


@contextmanager
def output_folder(folder: Path, reads: Iterable[str | Path] = ()) -> Iterator[Path]:
    """Opens an empty folder; its files afterwards, even after an error, replace those of an earlier call.

    Raises ValueError at the start if `folder` holds only other files, or any of the files in `reads`.
    """
    for path in reads:
        if Path(path).resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"--output-dir {folder}: {path} is read and lies there; choose another folder")
    if folder.exists() and not (folder.is_dir() and (_drawn(folder) is not None or not any(folder.iterdir()))):
        raise ValueError(f"--output-dir {folder}: holds other files; choose a new folder")
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.absolute().parent) as made:
        try:
            yield Path(made)
        finally:
            _replace(folder, Path(made))


def _replace(folder: Path, made: Path) -> None:
    files = sorted(path.relative_to(made) for path in made.rglob("*") if path.is_file())
    if not files:  # an error came before the first file
        return
    old = _drawn(folder) or []
    for name in old:
        (folder / name).unlink(missing_ok=True)
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).replace(folder / name)
    for parent in sorted({parent for name in old for parent in name.parents[:-1]}, reverse=True):
        if (folder / parent).is_dir() and not any((folder / parent).iterdir()):
            (folder / parent).rmdir()
    (folder / MARK).write_text(json.dumps({"drawn": [name.as_posix() for name in files]}), encoding="utf-8")


def _drawn(folder: Path) -> list[Path] | None:
    """Lists the files of an earlier call; None for a folder that was not made here."""
    try:
        names = [Path(name) for name in json.loads((folder / MARK).read_text(encoding="utf-8"))["drawn"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return [name for name in names if not name.is_absolute() and ".." not in name.parts]
