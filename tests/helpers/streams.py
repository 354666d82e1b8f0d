"""Streams of the folders that shard_files writes, and runs of them."""

from __future__ import annotations

from shard_files import SIDE, caption

import datasets_lib
from datasets_lib.streaming.stream import Stream
from trainers.engine.config.base_options import BaseConfig

KINDS = ("parquet", "tar")
SIZES = (5, 9, 3, 7, 6)  # examples of each shard
COUNT = sum(SIZES)


def base_of(folder, **changed):
    return BaseConfig(
        **{"train_data_dir": str(folder), "resolution": SIDE, "channels": 1, "streaming": True, **changed}
    )


def stream_of(folder, **changed) -> Stream:
    return datasets_lib.build(base_of(folder, **changed), "train")


def number_of(example):
    """The number that an example's grey value says; its caption and label must say the same."""
    number = round((example["image"].mean().item() + 1) * 127.5)
    assert (example["caption"], example["label"]) == (caption(number), number % 10)
    return number


def numbers(reader, count):
    return [number_of(reader.next(None)) for _ in range(count)]


def run_options(folder, **more):
    return {
        "base.dataset": None, "base.max_train_samples": None, "base.train_data_dir": str(folder), "base.streaming": True,
        "base.random_flip": True, "base.resolution": 24, **more,
    }  # fmt: skip
