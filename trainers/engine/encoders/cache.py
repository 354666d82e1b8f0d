"""Caches frozen encoders' outputs, in memory or on disk, under hashes of their inputs and of the encoders' files."""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from datasets_lib.example import Example, ImageData
from trainers.engine.run.files import flush, write_tensors

FORMAT = 1  # raise it when encoders' inputs, or the files here, change
KEY_DIGITS = 32


def text_key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_DIGITS]


class Cache:
    """Rows of tensors by key, in memory or in a folder for one encoder, where several processes may add files."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.rows_by_key: dict[str, Sequence[Tensor]] = {}
        self.files: dict[str, Any] = {}  # key -> the open file that holds it
        self.opened: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self.rows_by_key or key in self.files

    def rows(self, keys: list[str], columns: tuple[str, ...], device: torch.device) -> dict[str, Tensor]:
        """Returns the columns [B, ...] of these keys on the device; all rows have the same shape."""
        stacked = [torch.stack(rows) for rows in zip(*map(self._rows_of, keys), strict=True)]
        if device.type == "cuda":  # a copy from other memory would wait for the device
            stacked = [rows.pin_memory() for rows in stacked]
        return {name: rows.to(device, non_blocking=True) for name, rows in zip(columns, stacked, strict=True)}

    def _rows_of(self, key: str) -> Sequence[Tensor]:
        if key in self.rows_by_key:
            return self.rows_by_key[key]
        file, count = self.files[key]
        return [file.get_tensor(f"{key}.{number}") for number in range(count)]

    def add(self, rows: dict[str, list[Tensor]]) -> None:
        """Stores rows by key, in memory or in a file, which is flushed before it gets its name."""
        if self.folder is None:
            self.rows_by_key |= rows
        elif rows:
            token = secrets.token_hex(8)
            staged = self.folder / f".tmp-{token}"
            tensors = {f"{key}.{n}": row.contiguous() for key, each in rows.items() for n, row in enumerate(each)}
            try:
                write_tensors(tensors, staged)
                flush(staged)
                staged.rename(self.folder / f"rows-{token}.safetensors")
                flush(self.folder)
            except (OSError, SafetensorError) as error:
                staged.unlink(missing_ok=True)
                needed, free = sum(row.nbytes for row in tensors.values()), shutil.disk_usage(self.folder).free
                space = f"it needs {needed:,} bytes, {free:,} are free"
                raise OSError(
                    f"{self.folder}: a cache cannot be written ({error}); {space}; what is there stays"
                ) from None

    def look(self, wanted: Iterable[str] = ()) -> list[str]:
        """Finds the rows of new files in the folder; returns the wanted keys that are still missing.

        Removes a file with a broken header, with a warning.
        """
        for path in sorted(self.folder.glob("rows-*.safetensors")) if self.folder is not None else ():
            if path.name in self.opened:
                continue
            try:
                path.open("rb").close()  # safetensors reports every error as a missing file
            except OSError as error:
                raise OSError(f"{path}: a cache cannot be read ({error}); check its permissions") from None
            try:
                file = safe_open(path, framework="pt")
            except SafetensorError as error:
                print(f"WARNING: {path} cannot be read ({error}): removed, and encoded again", flush=True)
                path.unlink(missing_ok=True)
                continue
            counts = Counter(name.partition(".")[0] for name in file.keys())  # noqa: SIM118  # not a dict
            self.files |= {key: (file, count) for key, count in counts.items()}
            self.opened.add(path.name)
        return [key for key in wanted if key not in self]


def folder_of(directory: Path, kind: str, source: dict[str, Any]) -> tuple[Path, bool]:
    """Returns the folder of an encoder's rows, and whether it is new and other encoders have folders there."""
    text = json.dumps({"format": FORMAT, **source}, sort_keys=True)
    folder = directory / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    changed = not folder.is_dir() and any(directory.glob(f"{kind}-*"))
    if not folder.is_dir():
        folder.mkdir(parents=True)
        (folder / "source.json").write_text(text, encoding="utf-8")
    return folder, changed


class KeyedExamples(ImageData):
    """A data set whose examples hold keys of cached pictures, "<column>_key", instead of the pictures."""

    caption_note: str | None = None

    def __init__(self, whole: ImageData, keys: dict[str, list[tuple[str, ...]]]) -> None:
        self.whole, self.keys = whole, keys
        self.fingerprint, self.random, self.notes = whole.fingerprint, whole.random, whole.notes
        self.label_names, self.highest_label = whole.label_names, whole.highest_label
        self.encoded_by, self.caption_note = whole.encoded_by, whole.caption_note

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
