"""Many pictures on one, each as a network sees it, with its number and caption below."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

PICTURES, COLUMNS = 48, 8
LEAST_SIDE, MOST_SIDE = 112, 256  # pixels of a picture on the sheet
FONT_SIZE, LINE_HEIGHT, LINES, MARGIN = 11, 13, 3, 6


def spread(items: Sequence[int], count: int = PICTURES) -> list[int]:
    """Return at most `count` of the items, evenly spread, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(number * (len(items) - 1) / (count - 1))] for number in range(count)]


def contact_sheet(dataset: Any, indices: list[int]) -> Image.Image:
    """Return the examples' pictures in rows; without randomness, as in validation."""
    cells = [_cell(index, dataset.get(index, None)) for index in indices]
    width, height = max(cell.width for cell in cells) + MARGIN, max(cell.height for cell in cells) + MARGIN
    columns = min(COLUMNS, len(cells))
    sheet = Image.new("RGB", (columns * width + MARGIN, -(-len(cells) // columns) * height + MARGIN), "white")
    for number, cell in enumerate(cells):
        sheet.paste(cell, (number % columns * width + MARGIN, number // columns * height + MARGIN))
    return sheet


def _cell(index: int, example: dict[str, Any]) -> Image.Image:
    picture = _scaled(to_pil(example["image"]))
    cell = Image.new("RGB", (picture.width, picture.height + LINES * LINE_HEIGHT), "white")
    cell.paste(picture, mask=picture if picture.mode == "RGBA" else None)
    font = ImageFont.load_default(FONT_SIZE)
    letters = max(1, int(picture.width / font.getlength("n")))
    text = textwrap.wrap(f"{index} {example.get('caption', '')}", letters, max_lines=LINES, placeholder=" ...")
    for number, line in enumerate(text):
        ImageDraw.Draw(cell).text((0, picture.height + number * LINE_HEIGHT), line, "black", font)
    return cell


def to_pil(image: torch.Tensor) -> Image.Image:
    """Return the picture of a float tensor [C, H, W] in [-1, 1]: grey, RGB or RGBA."""
    pixels = ((image + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(np.ascontiguousarray(pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)))


def _scaled(picture: Image.Image) -> Image.Image:
    """Small pictures grow by a whole number, so that their pixels can be seen."""
    if max(picture.size) > MOST_SIDE:
        return ImageOps.contain(picture, (MOST_SIDE, MOST_SIDE), Image.Resampling.LANCZOS)
    return ImageOps.scale(picture, -(-LEAST_SIDE // max(picture.size)), Image.Resampling.NEAREST)
