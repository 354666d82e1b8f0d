"""PNG files that carry the settings they were made with, in the file itself and as JSON beside it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image, PngImagePlugin
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from trainers.engine.run.files import sha256

KEY = "diffloop"  # of the PNG's text chunk
LIBRARIES = ("diffloop", "torch", "diffusers", "transformers", "peft")


def settings_of(command: list[str], files: Iterable[Path], device: torch.device) -> dict[str, Any]:
    """Collects how pictures are made: command line, SHA-256 of the small files read, versions, device and threads."""
    hashes = {str(path): sha256(path) for path in files}
    machine = {"device": device.type, "threads": torch.get_num_threads()}
    return {"command": command, "files": hashes, "versions": {name: version(name) for name in LIBRARIES}} | machine


def check_files(picture: Path, settings: dict[str, Any]) -> None:
    """Raises FileNotFoundError or ValueError if a file that a picture was made from is missing or has changed."""
    for name, digest in settings["files"].items():
        if not Path(name).is_file():
            raise FileNotFoundError(f"{picture}: was made from {name}, which is not there; run from the same folder")
        if sha256(Path(name)) != digest:
            raise ValueError(f"{picture}: was made from another {name}; put that file back")


def as_pil(image: Tensor) -> Image.Image:
    """Converts a picture [C, H, W] in [0, 1] to 8 bits by rounding; torchvision would truncate."""
    return to_pil_image((image * 255).round().to(torch.uint8))


def save_picture(image: Image.Image, path: Path, settings: dict[str, Any]) -> None:
    """Writes `path` (a PNG) and its settings beside it, with the ending .json."""
    path.parent.mkdir(parents=True, exist_ok=True)
    chunk = PngImagePlugin.PngInfo()
    chunk.add_text(KEY, write_settings(path.with_suffix(".json"), settings))
    image.save(path, pnginfo=chunk)


def write_settings(path: Path, settings: dict[str, Any]) -> str:
    """Writes settings as JSON; returns the text."""
    text = json.dumps(settings, indent=1, sort_keys=True)
    path.write_text(text, encoding="utf-8")
    return text


def read_settings(path: Path) -> dict[str, Any]:
    """Reads a picture's settings; FileNotFoundError if it is missing, ValueError if it has none."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such picture")
    try:
        with Image.open(path) as image:
            settings = json.loads(getattr(image, "text", {}).get(KEY) or "null")
    except (OSError, ValueError):  # not a picture, or another program's text
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: does not say how it was made; give a PNG that diffloop's scripts wrote, unchanged")
    return settings
