"""Where a reader of a stream is."""

from __future__ import annotations

from typing import NamedTuple


class Place(NamedTuple):
    """Where a row begins. Places are ordered as a reader comes to them."""

    epoch: int = 0
    shard: int = 0  # among the reader's shards of the epoch
    offset: int = 0  # in the shard: a row of parquet, a byte of tar
