"""The raw material of a data set, before anything is decoded, and which of its rows a split has."""

from __future__ import annotations

import copy
import hashlib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from datasets_lib.errors import InputError, UserError
from datasets_lib.foreign import shown
from datasets_lib.images.files import TEXT_BYTES

CAPTION_COLUMNS = ("text", "caption", "prompt")
INVISIBLE = ("Cc", "Cf", "Zl", "Zp", "Zs")  # categories of Unicode
LARGEST_LABEL = (1 << 63) - 1  # of an int64


class Rows(Protocol):
    """Images by row, which may be read only when they are taken."""

    def __len__(self) -> int: ...
    def __getitem__(self, row: int, /) -> Any: ...


@dataclass
class Source:
    """Images and what is known of each, by row; folders, hub data sets and arrays all become a Source.

    `images[row]` is a Path, encoded bytes, or a uint8 array [H, W] or [H, W, C]; so is `masks[row]`, of the same size.
    A caption may be a list, from which one is drawn. `fingerprint` identifies the content, on any machine. `notes` are
    lines for the start of the run.
    """

    images: Rows
    origin: str
    fingerprint: str
    labels: list[int] | None = None
    label_names: list[str] | None = None
    captions: list[str | list[str]] | None = None
    notes: list[str] = field(default_factory=list)
    masks: Rows | None = None
    repeats: list[int] | None = None  # how often each comes in an epoch; None: once
    trigger_words: list[str | None] | None = None  # of each row; None: that of the run
    no_labels: str | None = None  # why there are none, where that may surprise
    unread: Sequence[str] = ()  # what looks like captions, where none were found
    names: Sequence[str] | None = None  # of images that are no files

    def name(self, row: int) -> str:
        """Return what an error message calls the image of a row."""
        if self.names is not None:
            return self.names[row]
        try:
            image = self.images[row]
        except UserError:  # a file that is not there
            image = None
        return str(image) if isinstance(image, Path) else f"row {row} of {self.origin}"


def select_rows(count: int, args: Any, split: str) -> list[int]:
    """Return the rows of a split in order: a held-out fraction and `max_train_samples` follow from `args.seed`."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(args.seed)).tolist()
    held_out = 0
    fraction = args.validation_split
    if fraction is not None and not isinstance(fraction, str):
        held_out = max(1, round(fraction * count))
        if not 0 < fraction < 1 or held_out >= count:
            raise InputError(
                f"base.validation_split is {fraction} of {count} images; give a sub-folder or split, or a fraction "
                "between 0 and 1 that leaves images to train on"
            )
    if split == "validation":
        return sorted(order[:held_out] if held_out else order)
    return sorted(order[held_out:][: args.max_train_samples])


def repeated(rows: Sequence[int], repeats: list[int] | None) -> Sequence[int]:
    """Return the place of each example's row among the rows: each as often as it comes in an epoch."""
    if repeats is None:
        return range(len(rows))
    return [place for place, row in enumerate(rows) for _ in range(repeats[row])]


def refuse_named_split(args: Any, origin: str, remedy: str = "give a fraction such as 0.1") -> None:
    """Raise a ValueError for a named validation split of data that has no such splits."""
    if isinstance(args.validation_split, str):
        raise InputError(
            f"base.validation_split is {args.validation_split!r}, but {origin} has no named splits; {remedy}"
        )


def changed(args: Any, **options: Any) -> Any:
    """Return a copy of the options with other values."""
    found = copy.copy(args)
    vars(found).update(options)
    return found


def digest(*parts: Any) -> str:
    """Return 16 hex digits that identify the parts and their order."""
    content = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else repr(part).encode()
        # The length goes first, so that ("ab", "c") and ("a", "bc") differ.
        content.update(len(data).to_bytes(8, "little") + data)
    return content.hexdigest()[:16]


def _is_visible(text: str) -> bool:
    """Whether a text has more than blanks and characters without a width, such as U+200B."""
    return bool(text.strip()) and (text.isascii() or any(unicodedata.category(char) not in INVISIBLE for char in text))


def check_caption(caption: Any, place: str) -> str | list[str]:
    """Return the caption, a text or a list of texts; raise a ValueError naming `place` if any is missing."""
    texts = caption if isinstance(caption, list) else [caption]
    if not texts or not all(isinstance(text, str) and _is_visible(text) for text in texts):
        found = shown(repr(caption))
        raise InputError(
            f"{shown(place)} has no caption (found {found}); give it a text or a list of texts, or remove it"
        )
    if any("\0" in text for text in texts):
        found = shown(repr(caption[:20]))
        raise InputError(f"{shown(place)} has a caption that is no text ({found}...); save it as UTF-8")
    try:
        size = sum(len(text.encode()) for text in texts)
    except UnicodeEncodeError:
        raise InputError(f"{shown(place)} has a caption with half of a character (a surrogate); mend it") from None
    if size > TEXT_BYTES:
        raise InputError(f"{shown(place)} has a caption of {size:,} bytes, and at most {TEXT_BYTES:,} are read")
    return caption
