"""From a PIL image to the tensor that a network sees; whatever is random draws from the generator it is given."""

from __future__ import annotations

from typing import NamedTuple

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


class View(NamedTuple):
    """The square that an example shows of a resized picture, in pixels of it: from `top` and `left`, then mirrored."""

    top: int
    left: int
    right: int  # pixels that are cut off at the right
    flipped: bool = False

    def top_left(self) -> torch.Tensor:
        """Return int64 [2]: where the square begins in the resized picture; in the mirrored one if it is flipped."""
        return torch.tensor([self.top, self.right if self.flipped else self.left])

    def cut(self, pixels: torch.Tensor, resolution: int) -> torch.Tensor:
        """Return the square of [C, H, W]."""
        pixels = pixels[:, self.top : self.top + resolution, self.left : self.left + resolution]
        return pixels.flip(-1) if self.flipped else pixels


def draw_view(size: tuple[int, int], resolution: int, generator: torch.Generator | None) -> View:
    """Return the square of a picture of (height, width) pixels: in the centre or, with a generator, anywhere."""
    width, height = resized_size(size[::-1], resolution)
    top = left = 0
    if not height == width == resolution:
        top = _offset(height - resolution, generator)
        left = _offset(width - resolution, generator)
    return View(top, left, width - resolution - left)


def _offset(room: int, generator: torch.Generator | None) -> int:
    return room // 2 if generator is None else draw(room + 1, generator)


def draw(count: int, generator: torch.Generator) -> int:
    """Draw an integer from [0, count)."""
    return int(torch.randint(count, (), generator=generator))


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """Map uint8 to float32 in [-1, 1]."""
    return pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1)
