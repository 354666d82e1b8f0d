"""Latents that scripts/encode.py wrote: the posteriors of an autoencoder, memory-mapped."""

from __future__ import annotations

import bisect
import copy
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from datasets_lib.example import ImageData
from datasets_lib.images.source import digest
from datasets_lib.images.splits import select_rows

INDEX = "index.json"
FORMAT = 1


class LatentDataset(ImageData):
    """Examples {"mean", "logvar": float32 [c, h, w], "caption", and "label" where the pictures have one}."""

    random = False  # the posterior is drawn from by slot, in the task
    picture_columns = ()  # there is nothing to encode

    def __init__(self, folder: Path, index: dict[str, Any], args: Any, split: str) -> None:
        self.folder, self.index = folder, index
        self.rows = select_rows(index["examples"], args, split)
        self.fingerprint = digest(index["fingerprint"], split, np.array(self.rows, dtype=np.int64).tobytes())
        self.label_names = index["label_names"]
        self.encoded_by = index["encoded_by"]
        self.highest_label = max(index["labels"]) if index["labels"] else None
        self.caption = args.caption  # of pictures that had none when they were encoded
        self.starts = [shard["start"] for shard in index["shards"]]
        self.opened: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"opened": {}}  # a worker opens its own

    def only(self, indices: Sequence[int]) -> LatentDataset:
        """Return the data set with these examples alone."""
        few = copy.copy(self)
        few.rows, few.opened = [self.rows[index] for index in indices], {}
        return few

    def get(self, index: int, generator: torch.Generator | None) -> dict[str, Any]:
        row = self.rows[index]
        number = bisect.bisect_right(self.starts, row) - 1
        name, place = self.index["shards"][number]["file"], row - self.starts[number]
        if name not in self.opened:
            self.opened[name] = open_shard(self.folder / name)
        example = {key: self.opened[name].get_slice(key)[place].float() for key in ("mean", "logvar")}
        if self.index["labels"]:
            example["label"] = self.index["labels"][row]
        return {**example, "caption": self._caption(row)}

    def _caption(self, row: int) -> str:
        return self.index["captions"][row] if self.index["captions"] else self.caption

    def captions(self, column: str = "caption") -> Iterator[str]:
        """Yield the text of every example."""
        return map(self._caption, self.rows)

    @property
    def caption_note(self) -> str | None:
        """The line that a task which reads captions shows where there are none."""
        found = f"no captions in {self.folder}: every example has base.caption = {self.caption!r}"
        return None if self.index["captions"] else found


def open_shard(path: Path) -> Any:
    """A memory-mapped file; ValueError where it is not there or broken."""
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); encode the data set again") from None


def build(args: Any, split: str, path: str) -> LatentDataset:
    """Build the latents of a folder; `validation_split` is the name of a sub-folder, or a fraction of the training set.

    Raises FileNotFoundError for a folder without latents, ValueError for those of pictures of another size.
    """
    named = isinstance(args.validation_split, str)
    folder = Path(path) / (args.validation_split if split == "validation" and named else "train")
    if not (folder / INDEX).is_file():
        there = ", ".join(sorted(file.parent.name for file in Path(path).glob(f"*/{INDEX}"))) or "nothing"
        raise FileNotFoundError(
            f"{folder}: holds no latents; found in {path}: {there}; make them with scripts/encode.py"
        )
    if args.random_flip:
        raise ValueError("base.random_flip = true: latents cannot be mirrored; set it to false")
    for option in ("trigger_word", "shuffle_tags", "class_data_dir"):
        if getattr(args, option):
            raise ValueError(
                f"base.{option} = {getattr(args, option)}: latents have the captions with which they were encoded, and "
                "no pictures of a class; unset it"
            )
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    if index.get("format") != FORMAT:
        raise ValueError(f"{folder}: written by another version of diffloop; encode the data set again")
    for option in ("resolution", "channels"):
        if index[option] != getattr(args, option):
            found = f"latents of pictures with {option} {index[option]}, and base.{option} is {getattr(args, option)}"
            raise ValueError(f"{folder}: {found}; make them equal, or encode the data set again")
    return LatentDataset(folder, index, args, split)
