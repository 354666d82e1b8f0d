"""Pictures on disk that carry the settings they were made with: in the PNG itself, and as JSON beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

KEY = "diffloop"  # of the PNG's text chunk


def save_picture(image: Image.Image, path: Path, settings: dict[str, Any]) -> None:
    """Writes path (a PNG) and path.json; settings must be what JSON can hold."""
    text = json.dumps(settings, indent=1, sort_keys=True)
    chunk = PngImagePlugin.PngInfo()
    chunk.add_text(KEY, text)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, pnginfo=chunk)
    path.with_suffix(".json").write_text(text, encoding="utf-8")


def read_settings(path: Path) -> dict[str, Any]:
    """What a picture was made with; FileNotFoundError where it is not there, ValueError where it does not say."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such picture")
    with Image.open(path) as image:
        text = getattr(image, "text", {}).get(KEY)
    if text is None:
        raise ValueError(f"{path}: does not say how it was made; give a PNG that diffloop's scripts wrote, unchanged")
    return json.loads(text)
