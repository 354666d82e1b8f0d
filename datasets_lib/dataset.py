"""A source and its transforms: the data set that the loop sees."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from datasets_lib.choices import one_of
from datasets_lib.decoded import DecodedImages, decode_all
from datasets_lib.images import ImageError, ImageReader
from datasets_lib.source import Source, digest
from datasets_lib.transforms import crop, draw, flip, normalize


class ImageDataset:
    """Examples of one split, decoded on demand or, after `prepare`, once for all.

    `random` is False when `get` would not use its generator. `captioned` tells whether captions come from the data;
    otherwise each is `args.caption`.
    """

    def __init__(self, source: Source, args: Any, split: str):
        if not len(source.images):
            raise ValueError(f"the {split} set of {source.origin} has no images; check the data set")
        self.source = source
        self.rows = select_rows(len(source.images), args, split)
        self.fingerprint = digest(source.fingerprint, split, np.array(self.rows, dtype=np.int64).tobytes())
        self.label_names = source.label_names
        self.highest_label = max(source.labels) if source.labels else None
        self.notes = source.notes
        self.captioned = source.captions is not None
        self.caption = args.caption

        self.reader = ImageReader(
            args.resolution, args.channels, args.interpolation, args.background_color, args.max_image_pixels
        )
        self.training = split == "train"
        self.center_crop = args.center_crop
        self.random_flip = args.random_flip

        one_of("base.bad_images", args.bad_images, ("error", "skip"))
        # One flag per image in shared memory: workers report what they find, and none is counted twice.
        skipping = args.bad_images == "skip"
        self.bad = torch.zeros(len(self.rows), dtype=torch.bool).share_memory_() if skipping else None
        self.cache_bytes = args.image_cache_mb * 2**20
        self.decoded: DecodedImages | None = None
        self.random = self._is_random()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def bad_count(self) -> int:
        """How many images were found broken so far and replaced, in all worker processes."""
        return 0 if self.bad is None else int(self.bad.sum())

    def name(self, index: int) -> str:
        """Return the file, or the row, from which an example comes."""
        return self.source.name(self.rows[index])

    def prepare(self, show_progress: bool = True) -> None:
        """Decode everything into memory if `args.image_cache_mb` holds it; call once, before workers start.

        The memory is per process. A broken image raises here, or is replaced, as it would be in `get`.
        """
        least = len(self) * self.reader.channels * self.reader.resolution**2
        if self.decoded is None and least <= self.cache_bytes:
            self.decoded = decode_all(
                len(self), self._resized_bytes, self._decode_or_skip, self.cache_bytes, show_progress
            )
            self.random = self._is_random()

    def get(self, index: int, generator: torch.Generator | None) -> dict[str, Any]:
        """Return {"image": float32 [C, H, W] in [-1, 1], "caption": str, and "label": int where the data has labels}.

        Every random decision draws from `generator`; without one: centre crop, no flip, first caption.
        """
        if not self.random:
            generator = None
        position, pixels = self._pixels(index)
        pixels = crop(pixels, self.reader.resolution, None if self.center_crop else generator)
        if self.random_flip:
            pixels = flip(pixels, generator)
        example = {"image": normalize(pixels), "caption": self.caption}
        row = self.rows[position]
        if self.source.labels is not None:
            example["label"] = self.source.labels[row]
        if self.captioned:
            example["caption"] = choose_caption(self.source.captions[row], generator)
        return example

    def _is_random(self) -> bool:
        if not self.training:
            return False
        square = (self.reader.channels, self.reader.resolution, self.reader.resolution)
        crops = not self.center_crop and (self.decoded is None or set(self.decoded.shapes) - {None} != {square})
        return self.random_flip or crops or any(isinstance(text, list) for text in self.source.captions or ())

    def _pixels(self, index: int) -> tuple[int, torch.Tensor]:
        """Return the first usable position from `index` on, and its uint8 pixels."""
        if self.bad is None:
            return index, self._decode(index) if self.decoded is None else self.decoded[index]
        for step in range(len(self)):
            position = (index + step) % len(self)
            if not self.bad[position]:
                pixels = self._decode_or_skip(position) if self.decoded is None else self.decoded[position]
                if pixels is not None:
                    return position, pixels
        raise ValueError(f"none of the {len(self)} images of {self.source.origin} can be read; check the data set")

    def _decode(self, position: int) -> torch.Tensor:
        row = self.rows[position]
        try:
            return self.reader.read(self.source.images[row])
        except ImageError as error:
            raise ImageError(
                f"cannot use image {self.source.name(row)}: {error}; repair or remove it, "
                "or set base.bad_images=skip to replace such images"
            ) from error

    def _decode_or_skip(self, position: int) -> torch.Tensor | None:
        try:
            return self._decode(position)
        except ImageError as error:
            if self.bad is None:
                raise
            self.bad[position] = True
            if self.bad_count > max(1, len(self) // 10):
                raise ValueError(
                    f"{self.bad_count} of {len(self)} images cannot be read, and base.bad_images=skip replaces 10 % "
                    f"at most; the last: {error}"
                ) from error
            return None

    def _resized_bytes(self, position: int) -> int:
        return self.reader.resized_bytes(self.source.images[self.rows[position]])


def select_rows(count: int, args: Any, split: str) -> list[int]:
    """Return the rows of a split in order: a held-out fraction and `max_train_samples` follow from `args.seed`."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(args.seed)).tolist()
    held_out = 0
    fraction = args.validation_split
    if fraction is not None and not isinstance(fraction, str):
        held_out = max(1, round(fraction * count))
        if not 0 < fraction < 1 or held_out >= count:
            raise ValueError(
                f"base.validation_split is {fraction} of {count} images; give a sub-folder or split, or a fraction "
                "between 0 and 1 that leaves images to train on"
            )
    if split == "validation":
        return sorted(order[:held_out] if held_out else order)
    if args.max_train_samples is not None and args.max_train_samples < 1:
        raise ValueError(f"base.max_train_samples is {args.max_train_samples}; give at least 1, or null for all")
    return sorted(order[held_out:][: args.max_train_samples])


def choose_caption(caption: str | list[str], generator: torch.Generator | None) -> str:
    """Draw one of several captions, the first without a generator."""
    if isinstance(caption, str):
        return caption
    return caption[0] if generator is None else caption[draw(len(caption), generator)]
