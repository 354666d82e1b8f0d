"""Fits pictures of any aspect ratio into a model's square, and cuts them out again."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Size = tuple[int, int]  # height and width, pixels


class Fitted(NamedTuple):
    """A picture centred in a square, padded by repeating its edges."""

    square: Image.Image
    size: Size  # of the picture in it

    @property
    def pixels(self) -> Tensor:
        """The square as a tensor [3, S, S] in [-1, 1]."""
        return torch.from_numpy(np.array(self.square)).permute(2, 0, 1) / 127.5 - 1


def fit(picture: Image.Image, side: int) -> Fitted:
    """Resizes a picture so that its longer side is `side`, keeping its aspect ratio, and pads the other side."""
    scale = side / max(picture.size)
    width, height = (max(1, round(length * scale)) for length in picture.size)
    resized = picture.resize((width, height), Image.Resampling.LANCZOS)
    top, left = _corner(side, (height, width))
    margins = ((top, side - height - top), (left, side - width - left), (0, 0))
    return Fitted(Image.fromarray(np.pad(np.array(resized), margins, mode="edge")), (height, width))


def size_between(first: Size, last: Size, weight: float) -> Size:
    """Interpolates: (1 - weight) times the first size plus weight times the last."""
    height, width = (round((1 - weight) * a + weight * b) for a, b in zip(first, last, strict=True))
    return height, width


def unfit(square: Tensor, size: Size) -> Tensor:
    """Crops the picture of that size [C, H, W] from the middle of a square [C, S, S]."""
    top, left = _corner(square.shape[-1], size)
    return square[:, top : top + size[0], left : left + size[1]]


def _corner(side: int, size: Size) -> Size:
    return (side - size[0]) // 2, (side - size[1]) // 2
