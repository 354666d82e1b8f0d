"""Examples of a stream by number, read into memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from datasets_lib.shard_rows import RawRow

if TYPE_CHECKING:
    import torch

    from datasets_lib.stream import Stream


class HeldExamples:
    """Examples of a stream by number, such as those to validate on: rows in memory, whose pictures are encoded."""

    random = False
    picture_columns = ()

    def __init__(self, stream: Stream, rows: list[RawRow]) -> None:
        self.stream, self.rows, self.fingerprint = stream, rows, stream.fingerprint
        self.label_names, self.encoded_by = stream.label_names, stream.encoded_by
        self.captioned, self.caption, self.notes = stream.captioned, stream.caption, stream.notes
        columns = stream.columns
        self.highest_label = max(map(columns.label_of, rows), default=None) if columns.label else None

    def __len__(self) -> int:
        return len(self.rows)

    def get(self, index: int, generator: torch.Generator | None) -> dict[str, Any]:
        """Return an example; without a generator centre crop, no flip, first caption."""
        return self.stream.example(self.rows[index], generator)

    def name(self, index: int) -> str:
        """Return the row, and its shard, from which an example comes."""
        return self.rows[index].name
