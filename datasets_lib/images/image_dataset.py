"""A source and its transforms: the data set that the loop sees."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from datasets_lib.errors import InputError
from datasets_lib.example import ImageData
from datasets_lib.images.buckets import Size
from datasets_lib.images.captions import Captions
from datasets_lib.images.pictures import Pictures
from datasets_lib.images.source import Source, digest, repeated, select_rows
from datasets_lib.images.transforms import View, draw, draw_view, mirror, normalize, scale


class ImageDataset(ImageData):
    """Examples of one split, decoded when they are read or all at once by `prepare`."""

    caption_note: str | None = None
    picture_columns = ("image",)

    def __init__(self, source: Source, args: Any, split: str):
        if not len(source.images):
            raise InputError(f"the {split} set of {source.origin} has no images; check the data set")
        self.source, self.args = source, args
        rows = select_rows(len(source.images), args, split)
        self.training = split == "train"
        self.places = repeated(rows, source.repeats if self.training else None)  # of examples among the pictures
        self.rows = [rows[place] for place in self.places]
        self.fingerprint = digest(source.fingerprint, split, np.array(self.rows, dtype=np.int64).tobytes())
        self.label_names = source.label_names
        self.highest_label = max(source.labels) if source.labels else None
        self.notes = source.notes
        self.texts = Captions(source, args)
        self.caption_note, self.caption_problem = self.texts.note, self.texts.problem
        self.no_labels = source.no_labels

        self.pictures = Pictures(source, rows, args)
        self.random = self._is_random()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def bad_count(self) -> int:
        return self.pictures.bad_count

    def bucket_of(self, index: int) -> int:
        """Return the number of an example's size among the reader's; the first call reads every picture's header."""
        return self.pictures.buckets[self.places[index]]

    def name(self, index: int) -> str:
        return self.pictures.name(self.places[index])

    def prepare(self, show_progress: bool = True) -> None:
        """Decode everything if it fits `args.image_cache_mb`, per process; broken images are treated as in `get`."""
        self.pictures.prepare(show_progress)
        self.random = self._is_random()

    def only(self, indices: Sequence[int]) -> ImageDataset:
        """Return the data set with these examples alone, decoded ahead only if the whole would be."""
        few = copy.copy(self)
        few.rows = [self.rows[index] for index in indices]
        few.places = range(len(few.rows))
        few.pictures = Pictures(self.source, few.rows, self.args)
        few.pictures.cache_bytes = self.pictures.cache_bytes * len(few) // len(self.pictures)
        return few

    def get(self, index: int, generator: torch.Generator | None) -> dict[str, Any]:
        """Return an example; without a generator: centre crop, no flip, first caption.

        "original_size" is that of the upright image; "crop_top_left" is in the resized one.
        """
        position, (pixels, size) = self.pictures.read(self.places[index])
        view, example = self._draw(position, size, generator)
        return {**self._scaled(view.cut(pixels)), **_with_tensors(example)}

    @property
    def in_memory(self) -> bool:
        return self.pictures.decoded is not None and type(self).get is ImageDataset.get  # a subclass may have its own

    def get_batch(self, indices: Sequence[int], generators: Sequence[torch.Generator | None]) -> dict[str, Any]:
        """Return "pixels", uint8 [B, C, H, W], and "flipped", bool [B], instead of "image" and "mask"."""
        assert self.pictures.decoded is not None  # `in_memory` says so
        places = [self.pictures.find(self.places[index]) for index in indices]
        pairs = zip(places, generators, strict=True)
        views, examples = zip(*[self._draw(place, self.pictures.size(place), own) for place, own in pairs], strict=True)
        batch = {name: _column([example[name] for example in examples]) for name in examples[0]}
        if self._flips:
            batch["flipped"] = torch.tensor([view.flipped for view in views])
        return {"pixels": self.pictures.decoded.crops(places, views), **batch}

    def finish(self, batch: dict[str, Any]) -> dict[str, Any]:
        rest = {**batch}
        pixels = rest.pop("pixels")
        if "flipped" in rest:
            pixels = mirror(pixels, rest.pop("flipped"))
        return {**self._scaled(pixels), **rest}

    def without_image(self, index: int, generator: torch.Generator | None) -> dict[str, Any]:
        """Return the example without its image, which is decoded once only if broken ones are replaced."""
        position = self.pictures.find(self.places[index])
        view, example = self._draw(position, self.pictures.size(position), generator)
        if self.source.masks is not None:
            example["mask"] = scale(view.cut(self.pictures.mask(position)), 255)
        return {**_with_tensors(example), "flipped": view.flipped}

    def image(self, index: int, flipped: bool, column: str = "image") -> torch.Tensor:
        _, (pixels, size) = self.pictures.read(self.places[index])
        view = draw_view(size, self.pictures.reader.target(size), None)._replace(flipped=flipped)
        return normalize(view.cut(pixels[: self.pictures.reader.channels]))

    def image_keys(self, index: int, column: str = "image") -> tuple[str, ...]:
        position = self.pictures.find(self.places[index])
        return tuple(self.pictures.key(position, flipped) for flipped in (False, True)[: 1 + self._flips])

    def captions(self, column: str = "caption") -> Iterator[str]:
        """Yield every caption; one with shuffled tags once, in their order."""
        return self.texts.all(self.pictures.rows)

    @property
    def _flips(self) -> bool:
        return self.training and self.args.random_flip

    def _draw(self, position: int, size: Size, generator: torch.Generator | None) -> tuple[View, dict[str, Any]]:
        """The view of the picture, and the example's other columns. Draws in this order: crop, flip, caption."""
        if not self.random:
            generator = None
        view = draw_view(size, self.pictures.reader.target(size), None if self.args.center_crop else generator)
        if self.args.random_flip and generator is not None:
            view = view._replace(flipped=bool(draw(2, generator)))
        row = self.pictures.rows[position]
        example: dict[str, Any] = {"caption": self.texts.draw(row, generator)}
        if self.source.labels is not None:
            example["label"] = self.source.labels[row]
        return view, {**example, "original_size": size, "crop_top_left": view.top_left()}

    def _scaled(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """The image and, if there is one, the mask of [..., C, H, W]."""
        if self.source.masks is None:
            return {"image": normalize(pixels)}
        return {"image": normalize(pixels[..., :-1, :, :]), "mask": scale(pixels[..., -1:, :, :], 255)}

    def _is_random(self) -> bool:
        if not self.training:
            return False
        args = self.args
        return args.random_flip or not (args.center_crop or self._fits()) or self.texts.random

    def _fits(self) -> bool:
        """Whether no picture has to be cropped; False if they are not decoded yet."""
        shapes = () if self.pictures.decoded is None else self.pictures.decoded.shapes
        found = [shape[1:] == self.pictures.target(position) for position, shape in enumerate(shapes) if shape]
        return bool(found) and all(found)


def _with_tensors(example: dict[str, Any]) -> dict[str, Any]:
    """The example with its pairs of numbers as int64 [2]."""
    return {key: torch.tensor(value) if isinstance(value, tuple) else value for key, value in example.items()}


def _column(values: Sequence[Any]) -> list[str] | torch.Tensor:
    """Collates values; texts stay a list."""
    return list(values) if isinstance(values[0], str) else torch.tensor(values)
