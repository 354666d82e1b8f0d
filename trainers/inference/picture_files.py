"""Pictures on disk that carry the settings they were made with: in the PNG itself, and as JSON beside it."""

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
    """How pictures are made: the script and its arguments, SHA-256 of small files that it reads, and where it runs."""
    hashes = {str(path): sha256(path) for path in files}
    machine = {"device": device.type, "threads": torch.get_num_threads()}
    return {"command": command, "files": hashes, "versions": {name: version(name) for name in LIBRARIES}} | machine


def check_files(picture: Path, settings: dict[str, Any]) -> None:
    """FileNotFoundError or ValueError where a file that a picture was made from is gone, or is another one now."""
    for name, digest in settings["files"].items():
        if not Path(name).is_file():
            raise FileNotFoundError(f"{picture}: was made from {name}, which is not there; run from the same folder")
        if sha256(Path(name)) != digest:
            raise ValueError(f"{picture}: was made from another {name}; put that file back")


def as_pil(image: Tensor) -> Image.Image:
    """A picture [C, H, W] in [0, 1], rounded, where torchvision would cut off."""
    return to_pil_image((image * 255).round().to(torch.uint8))


def save_picture(image: Image.Image, path: Path, settings: dict[str, Any]) -> None:
    """Writes path (a PNG) and path.json; settings must be what JSON can hold."""
    path.parent.mkdir(parents=True, exist_ok=True)
    chunk = PngImagePlugin.PngInfo()
    chunk.add_text(KEY, write_settings(path.with_suffix(".json"), settings))
    image.save(path, pnginfo=chunk)


def write_settings(path: Path, settings: dict[str, Any]) -> str:
    """Writes them as JSON, and returns the text."""
    text = json.dumps(settings, indent=1, sort_keys=True)
    path.write_text(text, encoding="utf-8")
    return text


def read_settings(path: Path) -> dict[str, Any]:
    """What a picture was made with; FileNotFoundError where it is not there, ValueError where it does not say."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such picture")
    try:
        with Image.open(path) as image:
            settings = json.loads(getattr(image, "text", {}).get(KEY) or "null")
    except (OSError, ValueError):  # no picture at all, or another one's text
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: does not say how it was made; give a PNG that diffloop's scripts wrote, unchanged")
    return settings
