"""Every decoded image of a data set in one block of memory, which worker processes share."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import torch
from tqdm import tqdm


class DecodedImages:
    """uint8 images [C, H, W] by position, views of one tensor: no copy, and one file descriptor for spawned workers."""

    def __init__(self, sizes: list[int]):
        self.offsets = [0, *itertools.accumulate(sizes)]
        self.block = torch.empty(self.offsets[-1], dtype=torch.uint8)
        self.shapes: list[tuple[int, int, int] | None] = [None] * len(sizes)
        self.same_shape = False

    def put(self, position: int, pixels: torch.Tensor | None) -> None:
        """Store an image, or None for one that cannot be decoded."""
        if pixels is not None:
            self.shapes[position] = tuple(pixels.shape)
            self.block[self.offsets[position] : self.offsets[position + 1]] = pixels.flatten()

    def finish(self) -> DecodedImages:
        """Make the block [N, C, H, W], which is faster to index, if all shapes are equal."""
        self.same_shape = len(set(self.shapes)) == 1 and self.shapes[0] is not None
        if self.same_shape:
            self.block = self.block.view(len(self.shapes), *self.shapes[0])
        return self

    def __getitem__(self, position: int) -> torch.Tensor:
        if self.same_shape:
            return self.block[position]
        return self.block[self.offsets[position] : self.offsets[position + 1]].view(self.shapes[position])


def decode_all(
    count: int,
    resized_bytes: Callable[[int], int],
    decode: Callable[[int], torch.Tensor | None],
    budget: int,
    show_progress: bool,
) -> DecodedImages | None:
    """Decode positions 0 .. count - 1 in threads, or return None when they need more than `budget` bytes."""
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        sizes = _within(budget, pool.map(resized_bytes, range(count)))
        if sizes is None:
            return None
        decoded = DecodedImages(sizes)
        images = pool.map(decode, range(count))
        # The bar appears after three seconds, so that small data sets print nothing.
        progress = tqdm(images, "decoding images", count, delay=3, unit="image", disable=not show_progress)
        for position, pixels in enumerate(progress):
            decoded.put(position, pixels)
    return decoded.finish()


def _within(budget: int, sizes: Iterable[int]) -> list[int] | None:
    kept = []
    for size in sizes:
        kept.append(size)
        budget -= size
        if budget < 0:
            return None
    return kept
