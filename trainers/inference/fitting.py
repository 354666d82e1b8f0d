"""Pictures of any aspect on the square that a model works on, and back."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Size = tuple[int, int]  # height and width, pixels


class Fitted(NamedTuple):
    """A square with a whole picture in its middle; its edges are repeated around it."""

    square: Image.Image
    size: Size  # of the picture in it

    @property
    def pixels(self) -> Tensor:
        """[3, S, S] in [-1, 1]."""
        return torch.from_numpy(np.array(self.square)).permute(2, 0, 1) / 127.5 - 1


def fit(picture: Image.Image, side: int) -> Fitted:
    """Resizes a picture such that its longer side is `side`, with its aspect kept, and pads the other one."""
    scale = side / max(picture.size)
    sides = [max(1, round(length * scale)) for length in picture.size]
    resized = picture.resize(sides, Image.Resampling.LANCZOS)
    width, height = resized.size
    top, left = _corner(side, (height, width))
    margins = ((top, side - height - top), (left, side - width - left), (0, 0))
    return Fitted(Image.fromarray(np.pad(np.array(resized), margins, mode="edge")), (height, width))


def size_between(first: Size, last: Size, weight: float) -> Size:
    """(1 - weight) times the first, weight times the last."""
    height, width = (round((1 - weight) * a + weight * b) for a, b in zip(first, last, strict=True))
    return height, width


def unfit(square: Tensor, size: Size) -> Tensor:
    """The picture of that size [C, H, W] in the middle of a square [C, S, S]."""
    top, left = _corner(square.shape[-1], size)
    return square[:, top : top + size[0], left : left + size[1]]


def _corner(side: int, size: Size) -> Size:
    return (side - size[0]) // 2, (side - size[1]) // 2
