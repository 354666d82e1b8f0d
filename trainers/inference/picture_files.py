"""Pictures that scripts write, with the settings they were made with, in folders that a later call can reuse."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image, PngImagePlugin
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from datasets_lib.errors import InputError, MissingFileError
from datasets_lib.file_hashes import sha256
from datasets_lib.foreign import check_regular, read_json, shown
from trainers.engine.run.files import make_folder, new_file, write_text

KEY = "diffloop"  # of the PNG's text chunk
PARAMETERS = "parameters"  # of the chunk that other programs read: see infotext.py
MARK = ".diffloop.json"  # lists the files that were drawn into a folder
MARK_BYTES = 64 << 20
LIBRARIES = ("diffloop", "torch", "diffusers", "transformers", "peft")


def settings_of(command: list[str], files: Iterable[Path], device: torch.device) -> dict[str, Any]:
    """Collects how pictures are made; `files` are those that they depend on, except large ones."""
    hashes = {str(path): sha256(path) for path in files}
    machine = {"device": device.type, "threads": torch.get_num_threads()}
    return {"command": command, "files": hashes, "versions": {name: version(name) for name in LIBRARIES}} | machine


def check_files(picture: Path, settings: dict[str, Any]) -> None:
    """Raises FileNotFoundError or ValueError if a file that a picture was made from is missing or has changed."""
    for name, digest in settings["files"].items():
        if not Path(name).is_file():
            where = f"was made from {shown(name)}, which is not there; run from the same folder"
            raise MissingFileError(f"{picture}: {where}")
        if sha256(Path(name)) != digest:
            raise InputError(f"{picture}: was made from another {shown(name)}; put that file back")


def as_pil(image: Tensor) -> Image.Image:
    """Converts a picture [C, H, W] in [0, 1] to 8 bits by rounding; torchvision would truncate."""
    return to_pil_image((image * 255).round().to(torch.uint8))


def save_picture(image: Image.Image, path: Path, settings: dict[str, Any], infotext: str | None = None) -> None:
    """Writes a PNG with its settings in it, and next to it as .json; `infotext` is for other programs."""
    make_folder(path.parent)
    chunk = PngImagePlugin.PngInfo()
    if infotext is not None:
        chunk.add_text(PARAMETERS, infotext)
    chunk.add_text(KEY, write_settings(path.with_suffix(".json"), settings))
    with new_file(path) as file:
        image.save(file, "PNG", pnginfo=chunk)


def write_settings(path: Path, settings: dict[str, Any]) -> str:
    """Writes settings as JSON; returns the text."""
    text = json.dumps(settings, indent=1, sort_keys=True)
    write_text(path, text)
    return text


def read_settings(path: Path) -> dict[str, Any]:
    """Reads a picture's settings; FileNotFoundError if it does not exist, ValueError if it has none."""
    if not path.is_file():
        raise MissingFileError(f"{path}: there is no such picture")
    try:
        with Image.open(check_regular(path), formats=["PNG"]) as image:
            settings = json.loads(getattr(image, "text", {}).get(KEY) or "null")
    except (
        OSError,
        ValueError,
        RecursionError,
        Image.DecompressionBombError,
    ):  # not a picture, or another program's text
        settings = None
    if not isinstance(settings, dict):
        raise InputError(f"{path}: does not say how it was made; give a PNG that diffloop's scripts wrote, unchanged")
    return settings


def is_ours(path: Path) -> bool:
    """Whether a picture was drawn by a script, so that the next one may take its place."""
    try:
        return not path.is_symlink() and bool(read_settings(path))
    except (OSError, ValueError):
        return False


def below(folder: Path, *names: str) -> Path:
    """Returns a path below a run's folder; raises ValueError if a link on the way could lead out of it."""
    path = folder
    for name in names:
        path = path / name
        if path.is_symlink():
            raise InputError(f"{shown(path)}: is a link, and pictures are written into real folders; remove it")
    return path


@contextmanager
def output_folder(folder: Path, reads: Iterable[str | Path] = ()) -> Iterator[Path]:
    """Opens an empty folder; its files, even after an error, then replace those of an earlier call in `folder`.

    Raises ValueError at the start if `folder` holds only other files, or any of the files in `reads`, or a link.
    """
    for path in reads:
        if Path(path).resolve().is_relative_to(folder.resolve()):
            raise InputError(f"--output-dir {folder}: {path} is read and lies there; choose another folder")
    if folder.exists() and not (folder.is_dir() and (_drawn(folder) is not None or not any(folder.iterdir()))):
        raise InputError(f"--output-dir {folder}: holds other files; choose a new folder")
    if links := [path for path in folder.rglob("*") if path.is_symlink()]:
        raise InputError(f"--output-dir {folder}: holds the link {shown(links[0])}; remove it, or choose a new folder")
    make_folder(folder.absolute().parent)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.absolute().parent) as made:
        try:
            yield Path(made)
        finally:
            _replace(folder, Path(made))


def _replace(folder: Path, made: Path) -> None:
    files = sorted(path.relative_to(made) for path in made.rglob("*") if path.is_file())
    if not files:  # an error occurred before the first file
        return
    old = _drawn(folder) or []
    for name in old:
        if not (folder / name).is_dir():
            (folder / name).unlink(missing_ok=True)
    for name in files:
        make_folder((folder / name).parent)
        (made / name).replace(folder / name)
    for parent in sorted({parent for name in old for parent in name.parents[:-1]}, reverse=True):
        if (folder / parent).is_dir() and not any((folder / parent).iterdir()):
            (folder / parent).rmdir()
    write_text(folder / MARK, json.dumps({"drawn": [name.as_posix() for name in files]}))


def _drawn(folder: Path) -> list[Path] | None:
    """Lists the files of an earlier call; None if no such call made the folder."""
    try:
        names = [Path(name) for name in read_json(folder / MARK, MARK_BYTES)["drawn"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return [name for name in names if not name.is_absolute() and ".." not in name.parts]
