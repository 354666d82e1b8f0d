"""Examples of a stream by number, read into memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from datasets_lib.example import ImageData
from datasets_lib.streaming.rows import RawRow

if TYPE_CHECKING:
    import torch


@dataclass(eq=False, kw_only=True)
class HeldExamples(ImageData):
    """Examples of a stream by number, such as those to validate on: rows in memory, whose pictures are encoded.

    `make_example` makes one of a row and a generator; the rest is what every data set tells of itself.
    """

    rows: list[RawRow]
    make_example: Callable[[RawRow, torch.Generator | None], dict[str, Any]]
    fingerprint: str
    label_names: list[str] | None
    highest_label: int | None
    encoded_by: str | None
    notes: Sequence[str]

    random = False
    picture_columns = ()

    def __len__(self) -> int:
        return len(self.rows)

    def get(self, index: int, generator: torch.Generator | None) -> dict[str, Any]:
        """Return an example; without a generator centre crop, no flip, first caption."""
        return self.make_example(self.rows[index], generator)

    def name(self, index: int) -> str:
        """Return the row, and its shard, from which an example comes."""
        return self.rows[index].name
