"""One row of a shard."""

from __future__ import annotations

from typing import Any, NamedTuple

LATENTS = "safetensors"  # a column, or the end of a member's name: a file with mean and logvar
MASK = "mask"


class RawRow(NamedTuple):
    """One row as its shard has it."""

    columns: dict[str, Any]
    name: str  # what messages call it
    following: int  # the place of the next row
