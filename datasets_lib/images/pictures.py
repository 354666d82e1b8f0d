"""The pictures of one split: decoded on demand or ahead, broken ones replaced, each known by its content."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datasets_lib.images.buckets import Size, sizes_of
from datasets_lib.images.decode import ImageError, ImageReader
from datasets_lib.images.memory_cache import DecodedImages, Picture, decode_all, in_threads
from datasets_lib.images.source import Source

DECODING = 1  # raise it when the pixels that come from a file change


class Pictures:
    """Resized pictures by position, uint8 [C, H, W]; a mask, where there is one, is the last channel, so C + 1."""

    def __init__(self, source: Source, rows: list[int], args: Any) -> None:
        self.source, self.rows = source, rows
        self.reader = ImageReader(
            sizes_of(args), args.channels, args.interpolation, args.background_color, args.max_image_pixels
        )
        # What is transparent in a mask is not part of it.
        self.mask_reader = dataclasses.replace(self.reader, channels=1, background_color="black")
        self.channels = args.channels + (source.masks is not None)
        # Flags in shared memory: workers report what they find, and none is counted twice.
        skipping = args.bad_images == "skip"
        self.bad = torch.zeros(len(rows), dtype=torch.bool).share_memory_() if skipping else None
        self.good = torch.zeros(len(rows), dtype=torch.bool).share_memory_() if skipping else None
        self.cache_bytes = args.image_cache_mb * 2**20
        self.decoded: DecodedImages | None = None
        self.sizes: dict[int, Size] = {}
        self.contents: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def bad_count(self) -> int:
        """How many pictures were found broken so far and replaced, in all worker processes."""
        return 0 if self.bad is None else int(self.bad.sum())

    @cached_property
    def buckets(self) -> list[int]:
        """The number among `reader.sizes` of each picture's, from its header; broken ones go to the most frequent."""
        if len(self.reader.sizes) == 1:
            return [0] * len(self)
        numbers = {size: number for number, size in enumerate(self.reader.sizes)}
        sizes = in_threads(self._size_or_skip, len(self))
        found = [None if size is None else numbers[self.reader.target(size)] for size in sizes]
        counts = Counter(number for number in found if number is not None)
        most = max(counts, key=lambda number: counts[number], default=0)
        return [most if number is None else number for number in found]

    def target(self, position: int) -> Size:
        """Return the size of what an example shows of a picture."""
        sizes = self.reader.sizes
        return sizes[0] if len(sizes) == 1 else self.reader.target(self.size(position))

    def name(self, position: int) -> str:
        """Return the file, or the row, from which a picture comes."""
        return self.source.name(self.rows[position])

    def prepare(self, show_progress: bool) -> None:
        """Decode everything into memory if `args.image_cache_mb` holds it."""
        least = self.channels * sum(math.prod(self.reader.sizes[number]) for number in self.buckets)
        if self.decoded is None and least <= self.cache_bytes:
            self.decoded = decode_all(
                len(self), self._resized_bytes, self._decode_or_skip, self.cache_bytes, show_progress
            )

    def find(self, index: int) -> int:
        """Return the first usable position of the bucket from `index` on; where broken ones are replaced, decode."""
        if self.good is None or self.good[index]:
            return index
        return self._first_usable(index)[0]

    def read(self, index: int) -> tuple[int, torch.Tensor, Size]:
        """Return the first usable position of the bucket from `index` on, its pixels and its size before resizing."""
        if self.bad is None:
            return index, *(self.decode(index) if self.decoded is None else self.decoded[index])
        position, picture = self._first_usable(index)
        return position, *picture

    def size(self, position: int) -> Size:
        """Return (height, width) of the upright picture before resizing; nothing is decoded."""
        decoded = None if self.decoded is None else self.decoded.sizes[position]
        if decoded is not None:
            return decoded
        if position not in self.sizes:
            with self._naming(position):
                self.sizes[position] = self.reader.size(self._image(position))
        return self.sizes[position]

    def mask(self, position: int) -> torch.Tensor:
        """Return the mask of a picture, uint8 [1, H, W]; the picture is not decoded."""
        if self.decoded is not None:
            return self.decoded[position][0][-1:]
        return self._read_mask(position, self.size(position))

    def content(self, position: int) -> str:
        """Return the sha256 of a picture's file or array; it is read once."""
        if position not in self.contents:
            with self._naming(position):
                self.contents[position] = content(self._image(position))
        return self.contents[position]

    def key(self, position: int, flipped: bool) -> str:
        """Return hex digits that identify the pixels of the centre of a picture."""
        # of the other sizes, and of the limit, no pixel depends
        reader = dataclasses.replace(self.reader, sizes=(self.target(position),), max_image_pixels=1)
        parts = (DECODING, self.content(position), dataclasses.astuple(reader), "centre", flipped)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def _first_usable(self, index: int) -> tuple[int, Picture]:
        for step in range(len(self)):
            position = (index + step) % len(self)
            same = position == index or self.buckets[position] == self.buckets[index]
            if same and not (self.bad is not None and self.bad[position]):
                picture = self._decode_or_skip(position) if self.decoded is None else self.decoded[position]
                if picture is not None:
                    return position, picture
        number = self.buckets.count(self.buckets[index])
        which = self.source.origin
        if len(self.reader.sizes) > 1:
            height, width = self.reader.sizes[self.buckets[index]]
            which += f" in the bucket of {width} x {height} (width x height) pixels"
        raise ValueError(f"none of the {number} images of {which} can be read; check the data set")

    def decode(self, position: int) -> Picture:
        """Return the pixels and the size of a picture; raise ImageError that names it, whatever is wrong."""
        with self._naming(position):
            pixels, size = self.reader.read(self._image(position))
        if self.source.masks is not None:
            pixels = torch.cat([pixels, self._read_mask(position, size)])
        return pixels, size

    def _read_mask(self, position: int, size: Size) -> torch.Tensor:
        assert self.source.masks is not None
        mask = self.source.masks[self.rows[position]]
        name = f"its mask {mask}" if isinstance(mask, Path) else "its mask"
        with self._naming(position, name):
            pixels, mask_size = self.mask_reader.read(mask)
            if mask_size != size:
                sizes = [f"{width} x {height}" for height, width in (mask_size, size)]
                raise ImageError(f"the mask has {sizes[0]} pixels, the image {sizes[1]}")
        return pixels

    def _image(self, position: int) -> Path | bytes | np.ndarray:
        return self.source.images[self.rows[position]]

    @contextlib.contextmanager
    def _naming(self, position: int, part: str = "") -> Iterator[None]:
        try:
            yield
        except (ImageError, OSError) as error:
            reason = f"{part}: {error}" if part else error
            raise ImageError(
                f"cannot use image {self.name(position)}: {reason}; repair or remove it, "
                "or set base.bad_images=skip to replace such images"
            ) from error

    def _decode_or_skip(self, position: int) -> Picture | None:
        try:
            picture = self.decode(position)
        except ImageError as error:
            self._skip(position, error)
            return None
        if self.good is not None:
            self.good[position] = True
        return picture

    def _size_or_skip(self, position: int) -> Size | None:
        try:
            return self.size(position)
        except ImageError as error:
            self._skip(position, error)
            return None

    def _skip(self, position: int, error: ImageError) -> None:
        if self.bad is None:
            raise error
        self.bad[position] = True
        if self.bad_count > max(1, len(self) // 10):
            raise ValueError(
                f"{self.bad_count} of {len(self)} images cannot be read, and base.bad_images=skip replaces 10 % "
                f"at most; the last: {error}"
            ) from error

    def _resized_bytes(self, position: int) -> int:
        image_bytes = self.reader.resized_bytes(self._image(position))
        return image_bytes // self.reader.channels * self.channels


def content(image: Path | bytes | np.ndarray) -> str:
    """Return the sha256 of a file's bytes, or of an array's values and shape."""
    if isinstance(image, Path):
        with image.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if isinstance(image, bytes):
        return hashlib.sha256(image).hexdigest()
    shape = repr((image.dtype.str, image.shape)).encode()
    return hashlib.sha256(shape + image.tobytes()).hexdigest()
