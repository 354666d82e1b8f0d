"""A data set of the user's own as the loop sees it; options that it would ignore are errors."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from datasets_lib.errors import InputError
from datasets_lib.example import DataSet, Example, ImageData
from datasets_lib.images.source import changed, select_rows

ATTRIBUTES = ("random", "label_names", "highest_label", "encoded_by", "notes")
# options that only the data set itself can honour: one that does names them in `options`
OWN_TO_IT = {
    "center_crop": False, "random_flip": False, "interpolation": "bilinear", "background_color": "white",
    "trigger_word": None, "shuffle_tags": False, "bad_images": "error", "max_image_pixels": 64_000_000,
    "convert_to_srgb": True,
}  # fmt: skip


class OwnData(ImageData):
    """The examples of a data set of the user's own that the run may use, and the members that it has."""

    def __init__(self, inner: Any, args: Any, split: str) -> None:
        self.inner, self.args = inner, args
        self.fingerprint = inner.fingerprint
        for name in ATTRIBUTES:
            setattr(self, name, getattr(inner, name, getattr(ImageData, name)))
        self.rows: Sequence[int] = range(len(inner))
        if split == "train" and args.max_train_samples is not None and args.max_train_samples < len(inner):
            whole = changed(args, validation_split=None)  # build() has held examples out already
            self.rows = select_rows(len(inner), whole, split)
            self.fingerprint = f"{inner.fingerprint}-{len(self.rows)}-{args.seed}"

    def __len__(self) -> int:
        return len(self.rows)

    def get(self, index: int, generator: torch.Generator | None) -> Example:
        return self.inner.get(self.rows[index], generator)

    @property
    def caption_note(self) -> str | None:
        fixed = ", ".join(part for part in (self.args.trigger_word, self.args.caption) if part)
        note = f"the data set has no captions: every example has base.caption = {fixed!r}"
        return None if "caption" in self.get(0, None) else note

    def name(self, index: int) -> str:
        named = getattr(self.inner, "name", None)
        return super().name(index) if named is None else named(self.rows[index])

    def bucket_of(self, index: int) -> int:
        numbered = getattr(self.inner, "bucket_of", None)
        return super().bucket_of(index) if numbered is None else numbered(self.rows[index])

    @property
    def in_memory(self) -> bool:
        return hasattr(type(self.inner), "get_batch") and bool(getattr(self.inner, "in_memory", False))

    def get_batch(self, indices: Sequence[int], generators: Sequence[torch.Generator | None]) -> Example:
        return self.inner.get_batch([self.rows[index] for index in indices], generators)

    def finish(self, batch: Example) -> Example:
        return self.inner.finish(batch)

    def captions(self, column: str = "caption") -> Iterable[str] | None:
        listed = getattr(self.inner, "captions", None)
        return None if listed is None else listed()

    def only(self, indices: Sequence[int]) -> OwnData:
        few = copy.copy(self)
        few.rows = [self.rows[index] for index in indices]
        return few

    def prepare(self, show_progress: bool) -> None:
        if (prepare := getattr(self.inner, "prepare", None)) is not None:
            prepare(show_progress)


def adapted(inner: DataSet, args: Any, split: str) -> OwnData:
    """Returns the data set as the loop sees it; raises ValueError for options that would have no effect."""
    honoured = getattr(inner, "options", ())
    ignored = [name for name, usual in OWN_TO_IT.items() if getattr(args, name) != usual and name not in honoured]
    if ignored:
        raise InputError(
            f"base.{ignored[0]} = {getattr(args, ignored[0])}: base.dataset={args.dataset} returned a "
            f"{type(inner).__name__} that does not say that it honours it; leave it out, or name it in its `options`, "
            f'such as options = ("{ignored[0]}",)'
        )
    return OwnData(inner, args, split)
