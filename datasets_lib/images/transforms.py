"""From a PIL image to the tensor that a network sees; random crops and flips draw from a generator."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from datasets_lib.images.buckets import Size

FILTERS = {name.lower(): Image.Resampling[name] for name in ("NEAREST", "BILINEAR", "BICUBIC", "LANCZOS")}


def resized_size(size: Size, target: Size) -> Size:
    """Return the size at which a picture just covers the target, its aspect ratio kept."""
    by_height = target[0] * size[1] >= target[1] * size[0]
    new, old = (target[0], size[0]) if by_height else (target[1], size[1])
    height, width = (max(least, round(side * new / old)) for side, least in zip(size, target, strict=True))
    return height, width


def resized(image: Image.Image, size: Size, interpolation: str) -> Image.Image:
    """Return the image with this (height, width)."""
    return image if image.size == size[::-1] else image.resize(size[::-1], FILTERS[interpolation])


def to_tensor(image: Image.Image) -> torch.Tensor:
    """Return the image as uint8 [C, H, W]."""
    # a third of the time that a transposed copy of [H, W, C] takes
    return torch.from_numpy(np.stack([np.asarray(band) for band in image.split()]))


class View(NamedTuple):
    """The part of a resized picture that an example shows, in pixels: from `top` and `left`, then mirrored."""

    top: int
    left: int
    right: int  # pixels cut off at the right
    size: Size
    flipped: bool = False

    def top_left(self) -> Size:
        """Return where the part begins in the resized picture; in the mirrored one if it is flipped."""
        return self.top, self.right if self.flipped else self.left

    def crop(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the part of [C, H, W], not mirrored."""
        height, width = self.size
        return pixels[:, self.top : self.top + height, self.left : self.left + width]

    def cut(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the part of [C, H, W]."""
        return self.crop(pixels).flip(-1) if self.flipped else self.crop(pixels)


def draw_view(size: Size, target: Size, generator: torch.Generator | None) -> View:
    """Return the target's part of a picture of this size: in the centre or, with a generator, anywhere."""
    height, width = resized_size(size, target)
    top = left = 0
    if (height, width) != target:
        top = _offset(height - target[0], generator)
        left = _offset(width - target[1], generator)
    return View(top, left, width - target[1] - left, target)


def _offset(room: int, generator: torch.Generator | None) -> int:
    return room // 2 if generator is None else draw(room + 1, generator)


def draw(count: int, generator: torch.Generator) -> int:
    """Draw an integer from [0, count)."""
    return int(torch.randint(count, (), generator=generator))


def mirror(pixels: torch.Tensor, flipped: torch.Tensor) -> torch.Tensor:
    """Mirror the pictures of [B, C, H, W] that are `flipped`, bool [B]."""
    # whole pictures are picked: torch.where, by pixel, takes four times as long
    both, count = torch.cat([pixels, pixels.flip(-1)]), len(pixels)
    return both.index_select(0, torch.arange(count, device=pixels.device) + count * flipped)


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """Map uint8 to float32 in [-1, 1]; the same bits on every device."""
    return scale(pixels, 127.5).sub_(1)


def scale(pixels: torch.Tensor, divisor: float) -> torch.Tensor:
    """Divide uint8 to contiguous float32; the same bits on every device."""
    values = pixels.to(torch.float32, memory_format=torch.contiguous_format)
    return values.div_(values.new_full((), divisor))  # CUDA would multiply by the reciprocal of a number
