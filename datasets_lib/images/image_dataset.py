"""A source and its transforms: the data set that the loop sees."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from datasets_lib.example import ImageData
from datasets_lib.images.buckets import Size
from datasets_lib.images.captions import Captions
from datasets_lib.images.pictures import Pictures
from datasets_lib.images.source import Source, digest
from datasets_lib.images.splits import select_rows
from datasets_lib.images.transforms import View, draw, draw_view, mirror, normalize, scale


class ImageDataset(ImageData):
    """Examples of one split, decoded on demand or, after `prepare`, once for all.

    `random` is False when `get` would not use its generator.
    """

    caption_note: str | None = None
    picture_columns = ("image",)  # what `image` and `image_keys` know, for caches of encoded pictures

    def __init__(self, source: Source, args: Any, split: str):
        if not len(source.images):
            raise ValueError(f"the {split} set of {source.origin} has no images; check the data set")
        self.source, self.args = source, args
        self.rows = select_rows(len(source.images), args, split)
        self.fingerprint = digest(source.fingerprint, split, np.array(self.rows, dtype=np.int64).tobytes())
        self.label_names = source.label_names
        self.highest_label = max(source.labels) if source.labels else None
        self.notes = source.notes
        self.texts = Captions(source, args)
        self.caption_note = self.texts.note

        self.pictures = Pictures(source, self.rows, args)
        self.training = split == "train"
        self.center_crop = args.center_crop
        self.random_flip = args.random_flip
        self.random = self._is_random()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def bad_count(self) -> int:
        """How many images were found broken so far and replaced, in all worker processes."""
        return self.pictures.bad_count

    @property
    def bucket_sizes(self) -> list[Size]:
        """The (height, width) that examples may have: one square without buckets."""
        return list(self.pictures.reader.sizes)

    def bucket_of(self, index: int) -> int:
        """Return the number among `bucket_sizes` of an example's size; the first call reads every picture's header."""
        return self.pictures.buckets[index]

    def name(self, index: int) -> str:
        """Return the file, or the row, from which an example comes."""
        return self.pictures.name(index)

    def prepare(self, show_progress: bool = True) -> None:
        """Decode everything into memory if `args.image_cache_mb` holds it; call once, before workers start.

        The memory is per process. A broken image raises here, or is replaced, as it would be in `get`.
        """
        self.pictures.prepare(show_progress)
        self.random = self._is_random()

    def only(self, indices: Sequence[int]) -> ImageDataset:
        """Return the data set with these examples alone, decoded ahead only where the whole would be."""
        few = copy.copy(self)
        few.rows = [self.rows[index] for index in indices]
        few.pictures = Pictures(self.source, few.rows, self.args)
        few.pictures.cache_bytes = self.pictures.cache_bytes * len(few) // len(self)
        return few

    def get(self, index: int, generator: torch.Generator | None) -> dict[str, Any]:
        """Return an example; every random decision draws from `generator`.

        Without one: centre crop, no flip, first caption. "image" is float32 [C, H, W] in [-1, 1], "caption" str,
        "original_size" int64 [2], height and width of the upright image, "crop_top_left" int64 [2], where the crop
        begins in the resized image; where the data has them "label" int, "mask" float32 [1, H, W] in [0, 1].
        H and W are those of its bucket.
        """
        position, pixels, size = self.pictures.read(index)
        view, example = self._draw(position, size, generator)
        return {**self._scaled(view.cut(pixels)), **_with_tensors(example)}

    @property
    def in_memory(self) -> bool:
        """Whether `get_batch` can be used: after `prepare`, where everything fitted, and `get` is this one."""
        return self.pictures.decoded is not None and type(self).get is ImageDataset.get

    def get_batch(self, indices: Sequence[int], generators: Sequence[torch.Generator | None]) -> dict[str, Any]:
        """Return what `get` does for each index and its generator, collated, for `finish`.

        Instead of "image" and "mask" there are "pixels", uint8 [B, C, H, W], and "flipped", bool [B].
        """
        assert self.pictures.decoded is not None  # `in_memory` says so
        places = [self.pictures.find(index) for index in indices]
        pairs = zip(places, generators, strict=True)
        views, examples = zip(*[self._draw(place, self.pictures.size(place), own) for place, own in pairs], strict=True)
        batch = {name: _column([example[name] for example in examples]) for name in examples[0]}
        if self._flips:
            batch["flipped"] = torch.tensor([view.flipped for view in views])
        return {"pixels": self.pictures.decoded.crops(places, views), **batch}

    def finish(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return the examples of `get_batch`, which may have been moved to another device; computed there."""
        rest = {**batch}
        pixels = rest.pop("pixels")
        if "flipped" in rest:
            pixels = mirror(pixels, rest.pop("flipped"))
        return {**self._scaled(pixels), **rest}

    def without_image(self, index: int, generator: torch.Generator | None) -> dict[str, Any]:
        """Return the example that `get` would, with "flipped" (bool) instead of "image", which is not decoded.

        Where broken images are replaced, each is decoded once to know it.
        """
        position = self.pictures.find(index)
        view, example = self._draw(position, self.pictures.size(position), generator)
        if self.source.masks is not None:
            example["mask"] = scale(view.cut(self.pictures.mask(position)), 255)
        return {**_with_tensors(example), "flipped": view.flipped}

    def image(self, index: int, flipped: bool, column: str = "image") -> torch.Tensor:
        """Return the centre of a picture, plain or mirrored: float32 [C, H, W] in [-1, 1]."""
        _, pixels, size = self.pictures.read(index)
        view = draw_view(size, self.pictures.reader.target(size), None)._replace(flipped=flipped)
        return normalize(view.cut(pixels[: self.pictures.reader.channels]))

    def image_keys(self, index: int, column: str = "image") -> tuple[str, ...]:
        """Return hex digits that identify the content of `image`: plain and, where `get` may mirror it, mirrored."""
        position = self.pictures.find(index)
        return tuple(self.pictures.key(position, flipped) for flipped in (False, True)[: 1 + self._flips])

    def image_count(self, column: str = "image") -> int:
        """Return how many pictures the column draws from: `image` takes indices below it."""
        return len(self)

    def captions(self, column: str = "caption") -> Iterator[str]:
        """Yield every text that `get` may return; those with shuffled tags once, in their order."""
        return self.texts.all(self.rows)

    @property
    def _flips(self) -> bool:
        return self.training and self.random_flip

    def _draw(self, position: int, size: Size, generator: torch.Generator | None) -> tuple[View, dict[str, Any]]:
        """The part of an example that is not pixels. The order of the draws: crop, flip, caption."""
        if not self.random:
            generator = None
        view = draw_view(size, self.pictures.reader.target(size), None if self.center_crop else generator)
        if self.random_flip and generator is not None:
            view = view._replace(flipped=bool(draw(2, generator)))
        row = self.rows[position]
        example: dict[str, Any] = {"caption": self.texts.draw(row, generator)}
        if self.source.labels is not None:
            example["label"] = self.source.labels[row]
        return view, {**example, "original_size": size, "crop_top_left": view.top_left()}

    def _scaled(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """The image and, where there is one, the mask of [..., C, H, W]."""
        if self.source.masks is None:
            return {"image": normalize(pixels)}
        return {"image": normalize(pixels[..., :-1, :, :]), "mask": scale(pixels[..., -1:, :, :], 255)}

    def _is_random(self) -> bool:
        if not self.training:
            return False
        return self.random_flip or not (self.center_crop or self._fits()) or self.texts.random

    def _fits(self) -> bool:
        """Whether nothing has to be cropped, as far as that is known without reading."""
        shapes = () if self.pictures.decoded is None else self.pictures.decoded.shapes
        found = [shape[1:] == self.pictures.target(position) for position, shape in enumerate(shapes) if shape]
        return bool(found) and all(found)


def _with_tensors(example: dict[str, Any]) -> dict[str, Any]:
    """The example with its pairs of numbers as int64 [2]."""
    return {key: torch.tensor(value) if isinstance(value, tuple) else value for key, value in example.items()}


def _column(values: Sequence[Any]) -> list[str] | torch.Tensor:
    """Collates values; texts stay a list."""
    return list(values) if isinstance(values[0], str) else torch.tensor(values)
