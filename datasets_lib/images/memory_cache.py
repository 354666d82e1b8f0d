"""Every decoded image of a data set in one block of memory, which worker processes share."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TypeVar

import torch
from tqdm import tqdm

from datasets_lib.images.buckets import Size
from datasets_lib.images.transforms import View

T = TypeVar("T")
Picture = tuple[torch.Tensor, Size]  # resized pixels, and the size before


class DecodedImages:
    """uint8 images [C, H, W] by position, views of one tensor: no copy, and one file descriptor for spawned workers.

    `sizes` has each image's (height, width) before it was resized.
    """

    def __init__(self, byte_counts: list[int]):
        self.offsets = [0, *itertools.accumulate(byte_counts)]
        self.block = torch.empty(self.offsets[-1], dtype=torch.uint8)
        self.shapes: list[tuple[int, ...] | None] = [None] * len(byte_counts)
        self.sizes: list[Size | None] = [None] * len(byte_counts)

    def put(self, position: int, picture: Picture | None) -> None:
        """Store an image, or None for one that cannot be decoded."""
        if picture is not None:
            pixels, self.sizes[position] = picture
            self.shapes[position] = tuple(pixels.shape)
            self.block[self.offsets[position] : self.offsets[position + 1]] = pixels.flatten()

    @cached_property
    def shape(self) -> tuple[int, ...] | None:
        """The shape of all images, if they have the same one."""
        return self.shapes[0] if len(set(self.shapes)) == 1 else None

    def __getitem__(self, position: int) -> Picture:
        shape, size = self.shapes[position], self.sizes[position]
        assert shape is not None  # it could be decoded
        assert size is not None
        return self.block[self.offsets[position] : self.offsets[position + 1]].view(shape), size

    def crops(self, positions: Sequence[int], views: Sequence[View]) -> torch.Tensor:
        """Return the parts of these images that the views show, not mirrored: uint8 [B, C, H, W]."""
        if self.shape is not None and self.shape[1:] == views[0].size:
            return self.block.view(-1, *self.shape).index_select(0, torch.tensor(positions))
        # here, not on the device, to which pixels would be moved that no example shows
        return torch.stack([view.crop(self[place][0]) for place, view in zip(positions, views, strict=True)])


def decode_all(
    count: int,
    resized_bytes: Callable[[int], int],
    decode: Callable[[int], Picture | None],
    budget: int,
    show_progress: bool,
) -> DecodedImages | None:
    """Decode positions 0 .. count - 1 in threads, or return None if they need more than `budget` bytes."""
    byte_counts = []
    for size in in_threads(resized_bytes, count):
        byte_counts.append(size)
        budget -= size
        if budget < 0:
            return None
    decoded = DecodedImages(byte_counts)
    # The bar appears after three seconds, so that small data sets print nothing.
    images = in_threads(decode, count)
    progress = tqdm(images, "decoding images", count, delay=3, unit="image", disable=not show_progress)
    for position, picture in enumerate(progress):
        decoded.put(position, picture)
    return decoded


def in_threads(function: Callable[[int], T], count: int) -> Iterator[T]:
    """Yield function(0) ... function(count - 1), computed in threads."""
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        yield from pool.map(function, range(count))
