"""The pictures of one split: decoded on demand or ahead, broken ones replaced, each known by its content."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from datasets_lib.errors import InputError
from datasets_lib.file_hashes import FileHashes, cache_directory
from datasets_lib.foreign import shown
from datasets_lib.images.buckets import Size, sizes_of
from datasets_lib.images.decode import ImageError, ImageReader
from datasets_lib.images.memory_cache import DecodedImages, Picture, decode_all, in_threads
from datasets_lib.images.source import Source
from datasets_lib.images.transforms import resized_size

DECODING = 2  # raise it when the pixels that come from a file change
T = TypeVar("T")


class Pictures:
    """Resized pictures by position, uint8 [C, H, W]; with masks, these are a further channel, the last."""

    def __init__(self, source: Source, rows: list[int], args: Any) -> None:
        self.source, self.rows = source, rows
        self.reader = ImageReader(
            sizes_of(args), args.channels, args.interpolation, args.background_color, args.max_image_pixels,
            args.convert_to_srgb,
        )  # fmt: skip
        # transparent pixels do not belong to a mask, whose numbers are no colours
        self.mask_reader = dataclasses.replace(self.reader, channels=1, background_color="black", convert_to_srgb=False)
        self.channels = args.channels + (source.masks is not None)
        # Flags in shared memory: workers report what they find, and none is counted twice.
        self.skips = args.bad_images == "skip"
        flags = torch.zeros(2, len(rows), dtype=torch.bool)
        self.bad, self.good = flags.share_memory_() if self.skips else flags
        self.cache_bytes = args.image_cache_mb * 2**20
        self.decoded: DecodedImages | None = None
        self.sizes: dict[int, Size] = {}
        self.contents: dict[int, str] = {}
        self.hashes = FileHashes(cache_directory(args))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def bad_count(self) -> int:
        """How many pictures were found broken so far and replaced, in all worker processes."""
        return int(self.bad.sum())

    @cached_property
    def buckets(self) -> list[int]:
        """The number of each picture's size among the reader's, from its header; of broken ones the most frequent."""
        if len(self.reader.sizes) == 1:
            return [0] * len(self)
        sizes = in_threads(partial(self._or_skip, self.size), len(self))
        found = [None if size is None else self.reader.sizes.index(self.reader.target(size)) for size in sizes]
        counts = Counter(number for number in found if number is not None)
        most = max(counts, key=lambda number: counts[number], default=0)
        return [most if number is None else number for number in found]

    def target(self, position: int) -> Size:
        """Return the size of a picture in an example."""
        sizes = self.reader.sizes
        return sizes[0] if len(sizes) == 1 else self.reader.target(self.size(position))

    def name(self, position: int) -> str:
        """Return the file, or the row, from which a picture comes."""
        return self.source.name(self.rows[position])

    def prepare(self, show_progress: bool) -> None:
        """Decode everything into memory if `args.image_cache_mb` holds it."""
        least = self.channels * sum(math.prod(self.reader.sizes[number]) for number in self.buckets)
        if self.decoded is None and least <= self.cache_bytes:
            decode = partial(self._or_skip, self.decode)
            self.decoded = decode_all(len(self), self._resized_bytes, decode, self.cache_bytes, show_progress)

    def find(self, index: int) -> int:
        """Return the position that `read` returns; decode only if broken pictures are skipped and this one is new."""
        return index if not self.skips or self.good[index] else self.read(index)[0]

    def read(self, index: int) -> tuple[int, Picture]:
        """Return the first usable position of the bucket from `index` on, and its picture."""
        if not self.skips:
            return index, self._picture(index)
        for step in range(len(self)):
            position = (index + step) % len(self)
            same = position == index or self.buckets[position] == self.buckets[index]
            if same and not self.bad[position]:
                picture = self._or_skip(self._picture, position)
                if picture is not None:
                    self.good[position] = True
                    return position, picture
        number = self.buckets.count(self.buckets[index])
        which = self.source.origin
        if len(self.reader.sizes) > 1:
            height, width = self.reader.sizes[self.buckets[index]]
            which += f" in the bucket of {width} x {height} (width x height) pixels"
        raise InputError(f"none of the {number} images of {which} can be read; check the data set")

    def size(self, position: int) -> Size:
        """Return (height, width) of the upright picture before resizing; nothing is decoded."""
        if self.decoded is not None and (decoded := self.decoded.sizes[position]) is not None:
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
        """Return the sha256 of a picture's file or array; a file is read if it has changed since the last start."""
        if position not in self.contents:
            with self._naming(position):
                image = self._image(position)
                self.contents[position] = self.hashes.sha256(image) if isinstance(image, Path) else content(image)
        return self.contents[position]

    def key(self, position: int, flipped: bool) -> str:
        """Return hex digits that identify the pixels of the centre of a picture."""
        # no pixel depends on the other sizes or on the limit
        reader = dataclasses.replace(self.reader, sizes=(self.target(position),), max_image_pixels=1)
        parts = (DECODING, self.content(position), dataclasses.astuple(reader), "centre", flipped)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def _picture(self, position: int) -> Picture:
        return self.decode(position) if self.decoded is None else self.decoded[position]

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
        name = f"its mask {shown(mask)}" if isinstance(mask, Path) else "its mask"
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
                f"cannot use image {shown(self.name(position))}: {reason}; repair or remove it, "
                "or set base.bad_images=skip to replace such images"
            ) from error

    def _or_skip(self, read: Callable[[int], T], position: int) -> T | None:
        """Return what is read of a picture, or None if it is broken and will be replaced."""
        try:
            return read(position)
        except ImageError as error:
            if not self.skips:
                raise
            self.bad[position] = True
            if self.bad_count > max(1, len(self) // 10):
                raise InputError(
                    f"{self.bad_count} of {len(self)} images cannot be read, and base.bad_images=skip replaces 10 % "
                    f"at most; the last: {error}"
                ) from error
            return None

    def _resized_bytes(self, position: int) -> int:
        """Return how many bytes a decoded picture takes; 0 for one that cannot be opened, as decoding says why."""
        try:
            size = self.size(position)
        except ImageError:
            return 0
        return self.channels * math.prod(resized_size(size, self.reader.target(size)))


def content(image: bytes | np.ndarray) -> str:
    """Return the sha256 of bytes, or of an array's values and shape."""
    if isinstance(image, bytes):
        return hashlib.sha256(image).hexdigest()
    shape = repr((image.dtype.str, image.shape)).encode()
    return hashlib.sha256(shape + image.tobytes()).hexdigest()
