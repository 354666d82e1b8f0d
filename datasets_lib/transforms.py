"""From a PIL image to the tensor that a network sees; whatever is random draws from the generator it is given."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def resized_size(size: tuple[int, int], resolution: int) -> tuple[int, int]:
    """Return (width, height) with the short side at `resolution` and the aspect ratio kept."""
    short = min(size)
    width, height = (max(resolution, round(side * resolution / short)) for side in size)
    return width, height


def resize(image: Image.Image, resolution: int, interpolation: str) -> torch.Tensor:
    """Return the image, its short side resized to `resolution`, as uint8 [C, H, W]."""
    size = resized_size(image.size, resolution)
    if image.size != size:
        image = image.resize(size, INTERPOLATIONS[interpolation])
    # np.array copies: an array that shares PIL's memory is read-only.
    pixels = torch.from_numpy(np.array(image))
    return pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()


def crop(pixels: torch.Tensor, resolution: int, generator: torch.Generator | None) -> torch.Tensor:
    """Cut a square out of [C, H, W], in the centre or, with a generator, anywhere."""
    _, height, width = pixels.shape
    if height == width == resolution:
        return pixels
    top = _offset(height - resolution, generator)
    left = _offset(width - resolution, generator)
    return pixels[:, top : top + resolution, left : left + resolution]


def _offset(room: int, generator: torch.Generator | None) -> int:
    return room // 2 if generator is None else draw(room + 1, generator)


def flip(pixels: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """Mirror [C, H, W] left to right for half of the draws; never without a generator."""
    return pixels.flip(-1) if generator is not None and draw(2, generator) else pixels


def draw(count: int, generator: torch.Generator) -> int:
    """Draw an integer from [0, count)."""
    return int(torch.randint(count, (), generator=generator))


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """Map uint8 to float32 in [-1, 1]."""
    return pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1)
