"""Arranges pictures in a grid, with texts."""

from __future__ import annotations

import math
import textwrap

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

VISIBLE_SIZE = 64  # pixels of height; grids enlarge smaller pictures by an integer factor
READABLE_SIZE = 128  # the same with texts
FONT_SIZE = 11  # pixels
MAX_LINES = 4  # of a text


def grid_of(pictures: list[Tensor], columns: int | None, texts: list[str] | None = None) -> Tensor:
    """Puts sets of pictures [N, C, H, W] side by side, or below each other if columns are given; N texts below them."""
    from torchvision.utils import make_grid

    below = columns is not None
    columns = columns or math.ceil(math.sqrt(len(pictures[0])))
    zoom = max(1, (VISIBLE_SIZE if texts is None else READABLE_SIZE) // pictures[0].shape[-2])
    enlarged = [images.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3) for images in pictures]
    if texts is not None:
        strips = _strips(texts, enlarged[0].shape[-1])  # white, and of the same height for all
        enlarged = [torch.cat([images, strips.expand(-1, images.shape[1], -1, -1)], dim=2) for images in enlarged]
    grids = [make_grid(images, nrow=columns, padding=2, pad_value=1.0) for images in enlarged]
    channels, height, width = grids[0].shape
    gap = torch.ones(channels, 8, width) if below else torch.ones(channels, height, 8)
    parts = [part for grid in grids for part in (gap, grid)]
    return torch.cat(parts[1:], dim=1 if below else 2)


def labelled_grid(columns: dict[str, Tensor], rows: list[str]) -> Tensor:
    """Makes one picture [C, H, W] of pictures [rows, C, h, w] by column, with the names of columns and rows."""
    from torchvision.utils import make_grid

    cells = torch.stack(list(columns.values()), dim=1).flatten(0, 1)
    zoom = max(1, READABLE_SIZE // cells.shape[-2])
    cells = cells.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    channels, height, width = cells.shape[1:]
    grid = make_grid(cells, nrow=len(columns), padding=2, pad_value=1.0)
    if len(cells) == 1:  # make_grid does not pad a single picture
        grid = torch.nn.functional.pad(grid, (2, 2, 2, 2), value=1.0)
    heads, names = _strips(list(columns), width), _strips(rows, READABLE_SIZE, height)
    top = torch.ones(channels, heads.shape[2], grid.shape[2])
    left = torch.ones(channels, heads.shape[2] + grid.shape[1], READABLE_SIZE + 2)
    for number, head in enumerate(heads):
        top[:, :, 2 + number * (width + 2) :][:, :, :width] = head
    for number, name in enumerate(names):
        left[:, heads.shape[2] + 2 + number * (height + 2) :, 2:][:, :height] = name
    return torch.cat([left, torch.cat([top, grid], dim=1)], dim=2)


def _strips(texts: list[str], width: int, height: int | None = None) -> Tensor:
    """Draws texts on white, [N, 1, height, width]; by default as high as the longest needs."""
    font = ImageFont.load_default(FONT_SIZE)
    characters = max(4, int(width / font.getlength("e")))
    wrapped = [textwrap.wrap(text, characters, max_lines=MAX_LINES, placeholder=" ...") for text in texts]
    height = height or (FONT_SIZE + 3) * max(1, *map(len, wrapped)) + 2
    strips = []
    for lines in wrapped:
        strip = Image.new("L", (width, height), 255)
        ImageDraw.Draw(strip).multiline_text((1, 0), "\n".join(lines), fill=0, font=font, spacing=2)
        strips.append(torch.from_numpy(np.array(strip)).float().div(255)[None])
    return torch.stack(strips)
