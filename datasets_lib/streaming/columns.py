"""Finds the picture, caption and label columns of shards, and turns a row into a data set of one example."""

from __future__ import annotations

from typing import Any

import torch

from datasets_lib.checks import find_column, one_of
from datasets_lib.errors import InputError
from datasets_lib.foreign import shown
from datasets_lib.images.source import CAPTION_COLUMNS, LARGEST_LABEL, Source, check_caption
from datasets_lib.sources.hub import image_column, mask_column, unread_columns
from datasets_lib.streaming.raw_row import LATENTS, RawRow
from datasets_lib.streaming.rows import features_of
from datasets_lib.streaming.shards import Shard

TRIED_SHARDS = 8  # at most, until one can be read to find the columns


class ShardColumns:
    """The columns of a stream, found as those of a hub data set; ValueError if an option names none of them.

    `label_names` are those of the shards' own table, or None.
    """

    def __init__(self, features: dict[str, Any], args: Any, origin: str, label_names: list[str] | None) -> None:
        self.origin = origin
        self.latents = LATENTS in features
        self.mask = mask_column(features, args.mask_column)
        pictures = {name: kind for name, kind in features.items() if name != self.mask}
        self.image = None if self.latents else image_column(pictures, args.image_column)
        self.caption = find_column("base.caption_column", args.caption_column, features, CAPTION_COLUMNS)
        self.label = _label_column(features, args.label_column)
        taken = (self.image, self.mask, self.label)
        self.unread = [] if self.caption else unread_columns({n: k for n, k in features.items() if n not in taken})
        self.label_names = label_names or getattr(features.get(self.label or ""), "names", None)
        self.num_classes = len(self.label_names) if self.label_names else None

    @property
    def names(self) -> list[str]:
        """The columns that are read."""
        found = [name for name in (self.image, self.mask, self.caption, self.label) if name]
        return [*found, *([LATENTS] if self.latents else [])]

    def source(self, row: RawRow) -> Source:
        """Return the row as a data set of one; raise a ValueError with its name if something is missing."""
        captions = labels = masks = None
        if self.caption is not None:
            place = f"{row.name}, column {self.caption!r} (base.caption_column),"
            captions = [check_caption(row.columns.get(self.caption), place)]
        if self.label is not None:
            labels = [self.label_of(row)]
        if self.mask is not None:
            masks = [_encoded(row.columns.get(self.mask), row)]
        images = [b"" if self.image is None else _encoded(row.columns.get(self.image), row)]
        return Source(images, self.origin, "", labels, self.label_names, captions, masks=masks, names=[row.name])

    def label_of(self, row: RawRow) -> int:
        """Return the number of a row's class."""
        label = None if self.label is None else row.columns.get(self.label)
        if isinstance(label, str) and self.label_names:
            return self.label_names.index(one_of(f"the class of {row.name}", label, self.label_names))
        if type(label) is not int or not 0 <= label <= LARGEST_LABEL:
            raise InputError(
                f"{row.name} has the label {shown(repr(label))} in column {self.label!r}; labels are integers of at "
                "least 0: name another column in base.label_column, or make the shards with scripts/shard.py"
            )
        if self.num_classes is not None and label >= self.num_classes:
            raise InputError(
                f"{row.name} has the label {label} in column {self.label!r}, and there are {self.num_classes} classes, "
                "numbered from 0: raise num_classes, or mend the shard"
            )
        return label


def find_features(shards: list[Shard], origin: str, option: str) -> dict[str, Any]:
    """Return the columns of the first shard that can be read, with their types in `datasets`.

    Raises ValueError, which names the option with the shards, if none of the first ones can be read.
    """
    last = ""
    for shard in shards[:TRIED_SHARDS]:
        try:
            return features_of(shard)
        except Exception as error:  # every format and file system has its own
            last = f"{shown(shard.name)}: {shard.without_secrets(error)}"
    tried = min(len(shards), TRIED_SHARDS)
    raise InputError(f"none of the first {tried} shards of {origin} can be read; the last: {last}; check base.{option}")


def check_latents(args: Any, origin: str, about: dict[str, Any]) -> None:
    """Raise ValueError for latents of pictures with other sizes or channels, and for options that need pictures."""
    for option in ("resolution", "channels"):
        asked, found = getattr(args, option), about.get(option, getattr(args, option))
        if asked != found:
            raise InputError(
                f"{origin}: latents of pictures with {option} {found}, and base.{option} is {asked}; make them equal, "
                "or make the shards again"
            )
    if args.random_flip:
        raise InputError("base.random_flip = true: latents cannot be mirrored; set it to false")


def posterior(row: RawRow) -> dict[str, torch.Tensor]:
    """Return the row's latents, "mean" and "logvar": float32 [c, h, w]."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(row.columns.get(LATENTS) or b"")
        return {name: tensors[name].float() for name in ("mean", "logvar")}
    except (SafetensorError, KeyError) as error:
        raise InputError(f"{row.name}: its latents cannot be read ({error}); make the shards again") from None


def _label_column(features: dict[str, Any], wanted: str | None) -> str | None:
    """The column asked for, the only one of classes or, if there is none, `label`."""
    from datasets import ClassLabel

    if wanted is not None:
        return one_of("base.label_column", wanted, features)
    found = [name for name, kind in features.items() if isinstance(kind, ClassLabel)]
    if found:
        return found[0] if len(found) == 1 else None
    return "label" if "label" in features else None


def _encoded(value: Any, row: RawRow) -> bytes:
    """The bytes of a picture's column; a missing one reads as an empty file."""
    data = value.get("bytes") if isinstance(value, dict) else value
    if data is None and isinstance(value, dict) and value.get("path"):
        path = shown(repr(value["path"]))
        raise InputError(f"{row.name} names the file {path} and does not hold it; make shards that hold their files")
    if not isinstance(data, bytes | None):
        raise InputError(f"{row.name} has no picture but {type(data).__name__}; name its column in base.image_column")
    return data or b""
