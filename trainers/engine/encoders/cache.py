"""Caches frozen encoders' outputs, in memory or on disk, under hashes of their inputs and of the encoders' files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datasets_lib.errors import FileError, InputError
from datasets_lib.example import Example, ImageData
from datasets_lib.foreign import shown
from trainers.engine.encoders.rows_file import RowsFile, remove, write_rows
from trainers.engine.run.files import write_text

FORMAT = 2  # raise it when encoders' inputs, or the files here, change
KEY_DIGITS = 32

Shapes = dict[str, tuple[int | None, ...]]  # of a row by column; None for sizes that vary


def text_key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_DIGITS]


class Cache:
    """Rows of tensors by key, in memory or in a folder for one encoder, where several processes may add files.

    `shapes` and `dtype` are those of the encoder's rows, as in Encoder.
    """

    def __init__(self, folder: Path | None, shapes: Shapes | None = None, dtype: torch.dtype | None = None) -> None:
        self.folder, self.shapes, self.dtype = folder, shapes or {}, dtype
        self.rows_by_key: dict[str, Sequence[Tensor]] = {}
        self.files: dict[str, RowsFile] = {}  # by key
        self.seen: set[str] = set()  # names of files
        self.checked: set[str] = set()  # keys: a row is checked when it is first used

    def __contains__(self, key: str) -> bool:
        return key in self.rows_by_key or key in self.files

    def rows(self, keys: list[str], columns: tuple[str, ...], device: torch.device) -> dict[str, Tensor]:
        """Returns the columns [B, ...] of these keys on the device; all rows have the same shape.

        Raises OSError for a row that is damaged, or not the encoder's, and removes its file.
        """
        found = [self._row(key, columns) for key in keys]
        for key, row in zip(keys, found, strict=True):
            if [column.shape for column in row] != [column.shape for column in found[0]]:
                self._refuse(key, "has another shape than the rows of its batch")
        stacked = [torch.stack(rows) for rows in zip(*found, strict=True)]
        if device.type == "cuda":  # a copy from other memory would wait for the device
            stacked = [rows.pin_memory() for rows in stacked]
        return {name: rows.to(device, non_blocking=True) for name, rows in zip(columns, stacked, strict=True)}

    def _row(self, key: str, columns: tuple[str, ...]) -> Sequence[Tensor]:
        if key in self.rows_by_key:
            return self.rows_by_key[key]
        row = self.files[key].row(key)
        if key not in self.checked:
            problem = self.files[key].damage(key, row) or self._misfit(row, columns)
            if problem:
                self._refuse(key, problem)
            self.checked.add(key)
        return row

    def _misfit(self, row: Sequence[Tensor], columns: tuple[str, ...]) -> str | None:
        if len(row) != len(columns):
            return f"has {len(row)} columns, and the encoder writes {len(columns)}"
        for name, column in zip(columns, row, strict=True):
            wanted = self.shapes.get(name, (None,) * column.dim())
            sizes = list(zip(column.shape, wanted, strict=False))
            if len(wanted) != column.dim() or any(size != most for size, most in sizes if most is not None):
                return f"has {name} {list(column.shape)}, and the encoder writes {list(wanted)}"
            if column.dtype != (self.dtype or column.dtype):
                return f"has {name} in {column.dtype}, and the encoder writes {self.dtype}"
        return None

    def _refuse(self, key: str, problem: str) -> None:
        if key in self.rows_by_key:
            raise InputError(f"the encoder's row {key} {problem}")
        file = self.files[key]
        done = file.remove()
        raise FileError(f"{file.path}: row {shown(key)} {problem}; the file is {done} at the next start")

    def add(self, rows: dict[str, list[Tensor]]) -> None:
        """Stores rows by key, in memory or in a file."""
        if self.folder is None:
            self.rows_by_key |= rows
        elif rows:
            write_rows(self.folder, rows)

    def look(self, wanted: Iterable[str] = ()) -> list[str]:
        """Finds the rows of new files in the folder; returns the wanted keys that are still missing.

        Removes a file that cannot be read, and leaves out a link or anything else that is no file, with a warning.
        """
        for path in sorted(self.folder.glob("rows-*.safetensors")) if self.folder is not None else ():
            if path.name in self.seen:
                continue
            self.seen.add(path.name)
            if path.is_symlink() or not path.is_file():
                print(f"WARNING: {shown(path)} is a link or no file: left out, and encoded again", flush=True)
                continue
            try:
                file = RowsFile(path)
            except OSError as error:
                raise FileError(f"{path}: a cache cannot be read ({error}); check its permissions") from None
            except ValueError as error:
                print(f"WARNING: {shown(path)} cannot be read ({error}): {remove(path)}", flush=True)
                continue
            self.files |= dict.fromkeys(file.counts, file)
        return [key for key in wanted if key not in self]


def folder_of(directory: Path, kind: str, source: dict[str, Any]) -> tuple[Path, bool]:
    """Returns the folder of an encoder's rows, and whether it is new and other encoders have folders there."""
    text = json.dumps({"format": FORMAT, **source}, sort_keys=True)
    folder = directory / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    changed = not folder.is_dir() and any(directory.glob(f"{kind}-*"))
    if not folder.is_dir():
        try:
            folder.mkdir(parents=True)
            write_text(folder / "source.json", text)
        except OSError as error:  # such as a file in its place, or a link that leads nowhere
            raise FileError(f"{shown(folder)}: a cache cannot be made there ({shown(error)})") from None
    return folder, changed


class KeyedExamples(ImageData):
    """A data set whose examples hold keys of cached pictures, "<column>_key", instead of the pictures."""

    caption_note: str | None = None

    def __init__(self, whole: ImageData, keys: dict[str, list[tuple[str, ...]]]) -> None:
        self.whole, self.keys = whole, keys
        self.fingerprint, self.random, self.notes = whole.fingerprint, whole.random, whole.notes
        self.label_names, self.highest_label = whole.label_names, whole.highest_label
        self.encoded_by, self.caption_note, self.no_labels = whole.encoded_by, whole.caption_note, whole.no_labels

    def __len__(self) -> int:
        return len(self.whole)

    def get(self, index: int, generator: torch.Generator | None) -> Example:
        example = self.whole.without_image(index, generator)
        for column, keys in self.keys.items():
            prefix = column.removesuffix("image")
            place, flipped = example.pop(f"{prefix}index", index), example.pop(f"{prefix}flipped")
            example[f"{column}_key"] = keys[place][flipped]
        return example

    def name(self, index: int) -> str:
        return self.whole.name(index)

    def bucket_of(self, index: int) -> int:
        return self.whole.bucket_of(index)

    def captions(self, column: str = "caption") -> Iterable[str] | None:
        return self.whole.captions(column)

    @property
    def bad_count(self) -> int:
        return self.whole.bad_count

    def uncached(self) -> ImageData:
        return self.whole
