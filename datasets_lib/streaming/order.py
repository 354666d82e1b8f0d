"""The order of a stream's shards, a new one in each epoch, which of them a reader gets, and places in it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from datasets_lib.images.source import digest
from datasets_lib.streaming.shards import Shard


class Place(NamedTuple):
    """The start of a row. Places sort in reading order."""

    epoch: int = 0
    shard: int = 0  # among the reader's shards of the epoch
    offset: int = 0  # in the shard: a row of parquet, a byte of tar


class ShardOrder:
    """Shuffles the shards for each epoch, as a function of the seed, and deals them to readers one by one."""

    def __init__(self, shards: list[Shard], seed: int) -> None:
        self.shards, self.seed = shards, seed

    def of_epoch(self, epoch: int) -> list[Shard]:
        """Return the shards in the order of an epoch."""
        key = int(digest(self.seed, "shards", epoch), 16) >> 1
        order = torch.randperm(len(self.shards), generator=torch.Generator().manual_seed(key)).tolist()
        return [self.shards[number] for number in order]

    def of_reader(self, epoch: int, number: int, count: int) -> list[Shard]:
        """Return the shards number, number + count, ... of an epoch, which reader `number` of `count` reads."""
        return self.of_epoch(epoch)[number::count]
