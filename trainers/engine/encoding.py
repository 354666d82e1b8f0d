"""Runs a task's frozen stages in front of its networks; each is built when it is first needed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trainers.base import Encoder


class FrozenStages:
    """The encoders of a run by name, on the device and without gradients."""

    def __init__(self, encoders: dict[str, Encoder], device: torch.device) -> None:
        self.encoders = encoders
        self.device = device
        self._built: dict[str, nn.Module] = {}
        self._constants: dict[tuple[str, str], dict[str, Tensor]] = {}

    def encode(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Returns the batch with the columns that the encoders write; what a data set holds already is kept.

        Raises ValueError where an encoder reads a column that the data set does not have.
        """
        for name, encoder in self.encoders.items():
            if batch.keys() >= set(encoder.writes):
                continue
            if encoder.reads not in batch:
                raise ValueError(f"encoder {name} reads {encoder.reads!r}; the data set has {', '.join(batch)}")
            batch = {**batch, **self._run(name, batch[encoder.reads])}
        return batch

    def encoded(self, name: str, value: Any) -> dict[str, Tensor]:
        """One constant, such as the empty caption, through an encoder; computed once. Columns have B = 1."""
        key = (name, repr(value))
        if key not in self._constants:
            self._constants[key] = self._run(name, value[None] if isinstance(value, Tensor) else [value])
        return self._constants[key]

    @torch.no_grad()
    def _run(self, name: str, values: Any) -> dict[str, Tensor]:
        encoder = self.encoders[name]
        if name not in self._built:
            self._built[name] = encoder.build().to(self.device).eval().requires_grad_(False)
        columns = encoder.encode(self._built[name], values)
        if set(columns) != set(encoder.writes):
            raise ValueError(f"encoder {name} wrote {sorted(columns)}; its `writes` says {sorted(encoder.writes)}")
        return columns
