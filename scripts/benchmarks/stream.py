"""A stream of a million small examples: how soon the first batch is there, also far into it, and its memory."""

from __future__ import annotations

import gc
import io
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image

import datasets_lib
from trainers.engine.config.base_options import BaseConfig
from trainers.engine.data.stream_batches import StreamBatches
from trainers.engine.run.clock import Clock

SHARDS, ROWS = 16, 62_500  # a million
ROW_GROUP = 1000
BATCH, SIDE, PLACES, SEQUENTIAL = 64, 8, 100, 20_000
RESUMED = 900_000  # in the middle of a shard
MEMBER_BYTES = 2 * tarfile.BLOCKSIZE  # a header, and a picture of less than a block


def table(repetitions: int) -> list[dict[str, Any]]:
    """Medians of a stream of parquet and one of tar files."""
    return [row(kind, repetitions) for kind in ("parquet", "tar")]


def row(kind: str, repetitions: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        for shard in range(SHARDS):
            (write_parquet if kind == "parquet" else write_tar)(Path(folder, f"{shard:03}.{kind}"), shard * ROWS)
        written = time.perf_counter() - began
        base = BaseConfig(train_data_dir=folder, streaming=True, resolution=SIDE, channels=1, train_batch_size=BATCH)
        first = [seconds_to_a_batch(base, None) for _ in range(repetitions)]
        far = {"place": place_of(kind, RESUMED)}
        resumed = [seconds_to_a_batch(base, far) for _ in range(repetitions)]
        before, most = memory(base, kind)
        rate, after = speed(base)
        return {
            "shards": kind,
            "examples": SHARDS * ROWS,
            "seconds_to_write": written,
            "seconds_to_first_batch": float(np.median(first)),
            f"seconds_to_batch_at_{RESUMED}": float(np.median(resumed)),
            "resident_mib_after_first_batch": before,
            f"resident_mib_at_most_in_{PLACES}_places": most,
            f"resident_mib_after_{SEQUENTIAL}_more": after,
            "examples_per_second": rate,
            "runs": [*first, *resumed],
        }


def picture() -> bytes:
    data = io.BytesIO()
    Image.new("L", (SIDE, SIDE), 128).save(data, "PNG")
    return data.getvalue()


def write_parquet(path: Path, first: int) -> None:
    """One picture many times; the label is the example's number."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    schema = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")}).arrow_schema
    with pyarrow.parquet.ParquetWriter(path, schema, use_dictionary=False) as writer:
        for start in range(first, first + ROWS, ROW_GROUP):
            labels = list(range(start, min(start + ROW_GROUP, first + ROWS)))
            rows = {"image": [{"bytes": picture(), "path": None}] * len(labels), "label": labels}
            writer.write_table(pyarrow.table(rows, schema=schema))


def write_tar(path: Path, first: int) -> None:
    data = picture()
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for number in range(first, first + ROWS):
            info = tarfile.TarInfo(f"{number:07}.png")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
            archive.members.clear()


def place_of(kind: str, example: int) -> tuple[int, int, int]:
    """The place of an example in the first epoch."""
    shard, row = divmod(example, ROWS)
    return 0, shard, row if kind == "parquet" else row * MEMBER_BYTES


def batches_of(base: BaseConfig, position: dict[str, Any] | None) -> Any:
    """A process's batches from a position on, as a run of one process without workers has them."""
    stream = datasets_lib.build(base, "train").shard_for_rank(0, 1, 0)
    stream.readers = (position,)
    return iter(StreamBatches(stream, Clock(None, BATCH, 1, 1, max_train_steps=10**9), base, 0))


def seconds_to_a_batch(base: BaseConfig, position: dict[str, Any] | None) -> float:
    began = time.perf_counter()
    batch = next(batches_of(base, position))
    assert torch.is_tensor(batch["image"]), batch
    return time.perf_counter() - began


def memory(base: BaseConfig, kind: str) -> tuple[float, float]:
    """Resident MiB of this process after a batch, and at most after each of many batches, evenly spread."""
    next(batches_of(base, None))
    before, most = resident(), 0.0
    for number in range(PLACES):
        next(batches_of(base, {"place": place_of(kind, number * SHARDS * ROWS // PLACES)}))
        most = max(most, resident())
    return before, most


def resident() -> float:
    gc.collect()
    return psutil.Process().memory_info().rss / 2**20


def speed(base: BaseConfig) -> tuple[float, float]:
    """Examples per second of one reader, and the resident MiB after them."""
    batches = batches_of(base, None)
    next(batches)
    began = time.perf_counter()
    for _ in range(SEQUENTIAL // BATCH):
        next(batches)
    return SEQUENTIAL // BATCH * BATCH / (time.perf_counter() - began), resident()
