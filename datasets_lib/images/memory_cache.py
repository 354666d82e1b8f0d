"""Every decoded image of a data set in one block of memory, which worker processes share."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
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
        self.same_shape = False

    def put(self, position: int, picture: Picture | None) -> None:
        """Store an image, or None for one that cannot be decoded."""
        if picture is not None:
            pixels, self.sizes[position] = picture
            self.shapes[position] = tuple(pixels.shape)
            self.block[self.offsets[position] : self.offsets[position + 1]] = pixels.flatten()

    def finish(self) -> DecodedImages:
        """Make the block [N, C, H, W], which is faster to index, if all shapes are equal."""
        shape = self.shapes[0] if len(set(self.shapes)) == 1 else None
        if shape is not None:
            self.same_shape = True
            self.block = self.block.view(len(self.shapes), *shape)
        return self

    def __getitem__(self, position: int) -> Picture:
        shape, size = self.shapes[position], self.sizes[position]
        assert shape is not None  # nobody asks for one that cannot be decoded
        assert size is not None
        if self.same_shape:
            return self.block[position], size
        return self.block[self.offsets[position] : self.offsets[position + 1]].view(shape), size

    def crops(self, positions: Sequence[int], views: Sequence[View]) -> torch.Tensor:
        """Return the parts of these images that the views show, not mirrored: uint8 [B, C, H, W]."""
        if self.same_shape and self.block.shape[2:] == views[0].size:
            return self.block.index_select(0, torch.tensor(positions))
        # here, not on the device, to which pixels would have to be moved that nobody sees
        return torch.stack([view.crop(self[place][0]) for place, view in zip(positions, views, strict=True)])


def decode_all(
    count: int,
    resized_bytes: Callable[[int], int],
    decode: Callable[[int], Picture | None],
    budget: int,
    show_progress: bool,
) -> DecodedImages | None:
    """Decode positions 0 .. count - 1 in threads, or return None when they need more than `budget` bytes."""
    sizes = _within(budget, in_threads(resized_bytes, count))
    if sizes is None:
        return None
    decoded = DecodedImages(sizes)
    # The bar appears after three seconds, so that small data sets print nothing.
    images = in_threads(decode, count)
    progress = tqdm(images, "decoding images", count, delay=3, unit="image", disable=not show_progress)
    for position, picture in enumerate(progress):
        decoded.put(position, picture)
    return decoded.finish()


def in_threads(function: Callable[[int], T], count: int) -> Iterator[T]:
    """Yield function(0) ... function(count - 1), computed in threads."""
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        yield from pool.map(function, range(count))


def _within(budget: int, sizes: Iterable[int]) -> list[int] | None:
    kept = []
    for size in sizes:
        kept.append(size)
        budget -= size
        if budget < 0:
            return None
    return kept
