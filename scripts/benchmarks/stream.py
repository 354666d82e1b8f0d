"""A stream of a million small examples: the time to its first batch, and to one far into it, and its memory."""

from __future__ import annotations

import argparse
import gc
import io
import statistics
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import psutil
from PIL import Image

import datasets_lib
from datasets_lib.images.source import Source
from datasets_lib.streaming.writing import SUFFIXES, write_shard
from scripts.benchmarks.runs import seconds_of
from trainers.engine.config.base_options import BaseConfig
from trainers.engine.data.stream_batches import StreamBatches
from trainers.engine.run.clock import Clock

SHARDS, ROWS = 16, 62_500  # a million
BATCH, SIDE, PLACES, SEQUENTIAL = 64, 8, 100, 20_000
RESUMED = 900_000  # in the middle of a shard
MEMBER_BYTES = 2 * tarfile.BLOCKSIZE  # a header, and a picture of less than a block


def rows(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Medians of a stream of parquet and one of tar files."""
    return [row(kind, asked.pairs) for kind in SUFFIXES]


def row(kind: str, repetitions: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        written = seconds_of(lambda: write_shards(Path(folder), kind), 1)
        base = BaseConfig(train_data_dir=folder, streaming=True, resolution=SIDE, channels=1, train_batch_size=BATCH)
        first = [seconds_of(lambda: next(batches_of(base)), 1) for _ in range(repetitions)]
        resumed = [seconds_of(lambda: next(batches_of(base, place_of(kind, RESUMED))), 1) for _ in range(repetitions)]
        before, most = memory(base, kind)
        batches = batches_of(base)
        next(batches)
        seconds = seconds_of(lambda: next(batches), SEQUENTIAL // BATCH)
        return {
            "shards": kind,
            "examples": SHARDS * ROWS,
            "seconds_to_write": written,
            "seconds_to_first_batch": statistics.median(first),
            f"seconds_to_batch_at_{RESUMED}": statistics.median(resumed),
            "resident_mib_after_first_batch": before,
            f"resident_mib_at_most_in_{PLACES}_places": most,
            f"resident_mib_after_{SEQUENTIAL}_more": resident(),
            "examples_per_second": SEQUENTIAL // BATCH * BATCH / seconds,
            "runs": [*first, *resumed],
        }


def write_shards(folder: Path, kind: str) -> None:
    """One picture many times; in parquet with labels."""
    data = io.BytesIO()
    Image.new("L", (SIDE, SIDE), 128).save(data, "PNG")
    example = {"image": data.getvalue(), **({"label": 0} if kind == "parquet" else {})}
    for shard in range(SHARDS):
        path = folder / f"{shard:03}{SUFFIXES[kind]}"
        write_shard(path, (example for _ in range(ROWS)), kind, Source([], str(folder), ""))


def place_of(kind: str, example: int) -> tuple[int, int, int]:
    """The place of an example in the first epoch."""
    shard, row = divmod(example, ROWS)
    return 0, shard, row if kind == "parquet" else row * MEMBER_BYTES


def batches_of(base: BaseConfig, place: tuple[int, int, int] | None = None) -> Any:
    """Batches from a place on, as a run of one process without workers reads them."""
    dataset: Any = datasets_lib.build(base, "train")
    stream = dataset.shard_for_rank(0, 1, 0)
    stream.readers = (place and {"place": place},)
    return iter(StreamBatches(stream, Clock(None, BATCH, 1, 1, max_train_steps=10**9), base, 0))


def memory(base: BaseConfig, kind: str) -> tuple[float, float]:
    """Resident MiB of this process after a batch, and at most after each of many batches, evenly spread."""
    next(batches_of(base))
    before, most = resident(), 0.0
    for number in range(PLACES):
        next(batches_of(base, place_of(kind, number * SHARDS * ROWS // PLACES)))
        most = max(most, resident())
    return before, most


def resident() -> float:
    gc.collect()
    return psutil.Process().memory_info().rss / 2**20
