"""Runs a task's frozen encoders in front of its networks; each is built when first needed."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from datasets_lib.errors import InputError
from trainers.base import Encoder, Trainer
from trainers.engine.encoders.cache import Cache, text_key

REMEMBERED = 1000  # at most this many constants: an evaluation may have many prompts


class FrozenEncoders:
    """The encoders of a run by name; with one in `caches`, a batch holds "<column>_key" instead of pictures."""

    def __init__(self, encoders: dict[str, Encoder], device: torch.device) -> None:
        self.encoders = encoders
        self.device = device
        self.caches: dict[str, Cache] = {}
        self.fill_seconds: dict[str, float] = defaultdict(float)  # "cache_<column>/seconds", without build_seconds
        self.build_seconds: dict[str, float] = {}
        self._built: dict[str, nn.Module] = {}
        self._constants: dict[tuple[str, str], dict[str, Tensor]] = {}

    def encode(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Adds the columns that the encoders write, unless the data set has them."""
        for name, encoder in self.encoders.items():
            if batch.keys() >= set(encoder.writes):
                continue
            if encoder.reads not in batch and encoder.default is not None:
                batch = {**batch, encoder.reads: [encoder.default] * len(batch["slot"])}
            written = self._cached(name, batch)
            if written is None and encoder.reads in batch:
                written = self.run(name, batch[encoder.reads])
            if written is None and not encoder.optional:
                raise InputError(f"encoder {name} reads {encoder.reads!r}; the data set has {', '.join(batch)}")
            batch = {**batch, **(written or {})}
        return batch

    def _cached(self, name: str, batch: dict[str, Any]) -> dict[str, Tensor] | None:
        """Returns the columns that an encoder writes from its cache; None if a value of the batch is missing there."""
        column, writes = self.encoders[name].reads, self.encoders[name].writes
        if name not in self.caches or not batch.keys() & {column, f"{column}_key"}:
            return None
        keys = batch.get(f"{column}_key") or [text_key(text) for text in batch[column]]
        in_cache = all(key in self.caches[name] for key in keys)
        return self.caches[name].rows(keys, writes, self.device) if in_cache else None

    def encoded(self, name: str, value: Any) -> dict[str, Tensor]:
        """Encodes one constant, such as the empty caption, once; its columns have B = 1."""
        key = (name, repr(value))
        if len(self._constants) >= REMEMBERED:
            self._constants.clear()
        if key not in self._constants:
            values = value[None] if isinstance(value, Tensor) else [value]
            found = self._cached(name, {self.encoders[name].reads: values}) if isinstance(value, str) else None
            self._constants[key] = self.run(name, values) if found is None else found
        return self._constants[key]

    @torch.no_grad()
    def run(self, name: str, values: Any) -> dict[str, Tensor]:
        """Encodes a batch of values."""
        encoder = self.encoders[name]
        if name not in self._built:
            began = time.perf_counter()
            self._built[name] = encoder.build().to(self.device).eval().requires_grad_(False)
            self.build_seconds[name] = time.perf_counter() - began
        columns = encoder.encode(self._built[name], values)
        if set(columns) != set(encoder.writes):
            raise InputError(f"encoder {name} wrote {sorted(columns)}; its `writes` says {sorted(encoder.writes)}")
        return columns

    def release(self, name: str) -> None:
        """Moves an encoder off the device; it is built again if needed."""
        if name in self._built:
            self._built.pop(name).to("cpu")


def build_encoders(trainer: Trainer) -> FrozenEncoders:
    """Collects the task's encoders, which are built later, and lets the task encode constants."""
    encoders = FrozenEncoders(trainer.encoders(), trainer.device)
    trainer.encoded = encoders.encoded
    return encoders
