"""Sequences of pictures: contact sheet, GIF, and MP4 if imageio is installed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.transforms.functional import to_tensor

from trainers.engine.validation.grids import grid_of
from trainers.inference.picture_files import as_pil

FRAMES_PER_SECOND = 10
HELD_MILLISECONDS = 1000  # of the first and the last frame of a GIF
SHEET_SIDE = 256  # pixels; a contact sheet shrinks larger pictures


def centred(pictures: list[Image.Image]) -> list[Image.Image]:
    """Pads pictures with white to one size, the largest width and height, each centred."""
    width, height = (max(sides) for sides in zip(*(picture.size for picture in pictures), strict=True))
    padded = [Image.new("RGB", (width, height), "white") for _ in pictures]
    for canvas, picture in zip(padded, pictures, strict=True):
        place = (width - picture.width) // 2, (height - picture.height) // 2
        canvas.paste(picture, place, picture if picture.mode == "RGBA" else None)
    return padded


def contact_sheet(pictures: list[Image.Image], columns: int, texts: list[str]) -> Image.Image:
    """Arranges pictures of one size in rows, shrunk if large, with a text below each."""
    width, height = pictures[0].size
    scale = min(1.0, SHEET_SIDE / max(width, height))
    small = [picture.resize((max(1, round(width * scale)), max(1, round(height * scale)))) for picture in pictures]
    return as_pil(grid_of([torch.stack([to_tensor(picture) for picture in small])], columns, texts))


def write_gif(frames: list[Image.Image], path: Path, text: str) -> None:
    """Writes a looping animation of pictures of one size, with the text as its comment."""
    durations = [1000 // FRAMES_PER_SECOND] * len(frames)
    durations[0] = durations[-1] = HELD_MILLISECONDS
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0, comment=text)


def write_mp4(frames: list[Image.Image], path: Path, text: str) -> bool:
    """Writes the same as H.264, padded to even sides; returns False if imageio with ffmpeg is not installed."""
    if not (find_spec("imageio") and find_spec("imageio_ffmpeg")):
        return False
    import imageio

    width, height = frames[0].size
    even = [np.asarray(ImageOps.expand(frame, (0, 0, width % 2, height % 2), "white")) for frame in frames]
    options: dict[str, Any] = {"macro_block_size": 2, "output_params": ["-metadata", f"comment={text}"]}
    imageio.mimwrite(path, even, fps=FRAMES_PER_SECOND, codec="libx264", quality=8, **options)
    return True
