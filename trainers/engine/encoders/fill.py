"""Fills encoders' caches before the first step: every process encodes its share of the missing values."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from datasets_lib.errors import InputError
from datasets_lib.example import ImageData
from datasets_lib.file_hashes import cache_directory
from trainers.base import Encoder
from trainers.engine.config.base_options import BaseConfig
from trainers.engine.distributed.collectives import run_on_all
from trainers.engine.distributed.shared_folders import find_folders
from trainers.engine.encoders.cache import KEY_DIGITS, Cache, KeyedExamples, folder_of, text_key
from trainers.engine.encoders.rows_file import others
from trainers.engine.encoders.stages import FrozenEncoders
from trainers.engine.run.context import DataSets
from trainers.engine.run.progress import passing_bar

FILE_BYTES = 64 << 20  # of rows in one file, about
BATCHES_AHEAD = 2  # decoded while one is encoded
Rows = dict[str, list[torch.Tensor]]  # by key, one tensor per column
Values = dict[str, Any]  # by key: a text, or a function that reads a picture


def fill_caches(accelerator: Accelerator, encoders: FrozenEncoders, base: BaseConfig, datasets: DataSets) -> DataSets:
    """Fills the encoders' caches; returns the data sets with keys instead of cached pictures. Collective."""
    keys: list[dict[str, list[tuple[str, ...]]]] = [{} for _ in datasets]
    for name, encoder in encoders.encoders.items():
        if encoder.cache is None:
            continue
        began, column = time.perf_counter(), encoder.reads
        wanted: Values = {text_key(value): value for value in encoder.constants}
        for dataset, columns in zip(datasets, keys, strict=True):
            if dataset is None:
                continue
            if column in dataset.picture_columns:
                columns[column] = _picture_keys(accelerator, dataset, column)
                wanted |= {
                    key: partial(dataset.image, number, bool(flipped), column)
                    for number, both in enumerate(columns[column])
                    for flipped, key in enumerate(both)
                }
            elif column == "caption" and (texts := dataset.captions()) is not None:
                wanted |= {text_key(text): text for text in texts}
            elif column == "caption" or not encoder.optional:
                what = f"the data set does not list the values of column {column}"
                raise InputError(f"encoder {name} cannot be cached: {what}; set its cache to null")
        encoders.caches[name] = _filled(accelerator, encoders, base, name, wanted)
        encoders.release(name)
        seconds = time.perf_counter() - began - encoders.build_seconds.get(name, 0.0)
        encoders.fill_seconds[f"cache_{column}/seconds"] += seconds
    both = zip(datasets, keys, strict=True)
    return DataSets._make(KeyedExamples(whole, each) if whole is not None and each else whole for whole, each in both)


def _picture_keys(accelerator: Accelerator, dataset: ImageData, column: str) -> list[tuple[str, ...]]:
    """Returns the keys of a column's pictures by number; every process hashes its share of the files."""
    rank, world = accelerator.process_index, accelerator.num_processes
    numbers = range(rank, dataset.image_count(column), world)
    hashed = passing_bar(accelerator, "hashing pictures", numbers)
    own = {n: tuple(key[:KEY_DIGITS] for key in dataset.image_keys(n, column)) for n in hashed}
    found = {number: keys for part in gather_object([own]) for number, keys in part.items()}
    return [found[number] for number in sorted(found)]


def _filled(accelerator: Accelerator, encoders: FrozenEncoders, base: BaseConfig, name: str, wanted: Values) -> Cache:
    """Returns the encoder's cache with all wanted values; an error of one rank is raised on all."""
    cache, missing, sharing = _opened(accelerator, encoders.encoders[name], base, name, wanted)
    own = missing[sharing.index(accelerator.process_index) :: len(sharing)]
    batches = [own[start : start + base.train_batch_size] for start in range(0, len(own), base.train_batch_size)]
    read = passing_bar(accelerator, f"encoding {name}", _read_ahead(batches, wanted), total=len(batches))
    encoded = (_encode(encoders, name, *batch) for batch in read)
    if cache.folder is None:
        rows = run_on_all(accelerator, lambda: {key: each for part in encoded for key, each in part.items()})
        cache.add({key: each for part in gather_object([rows]) for key, each in part.items()})
    else:
        run_on_all(accelerator, lambda: _write(cache, encoded))
        cache.look()
    return cache


def _write(cache: Cache, encoded: Iterator[Rows]) -> None:
    rows: Rows = {}
    try:
        for part in encoded:
            rows |= part
            if sum(row.nbytes for each in rows.values() for row in each) > FILE_BYTES:
                cache.add(rows)
                rows = {}
    finally:  # also if a signal ends the run: the next start need not encode these again
        cache.add(rows)


def _read_ahead(batches: list[list[str]], wanted: Values) -> Iterator[tuple[list[str], list[Any]]]:
    """Yields the keys and values of each batch; threads decode pictures while earlier batches are encoded."""
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        ahead: deque[tuple[list[str], list[Future]]] = deque()
        for keys in [*batches, *[None] * BATCHES_AHEAD]:
            if keys is not None:
                ahead.append((keys, [pool.submit(_read, wanted[key]) for key in keys]))
            if ahead and (keys is None or len(ahead) > BATCHES_AHEAD):
                first, values = ahead.popleft()
                yield first, [value.result() for value in values]


def _read(value: Any) -> Any:
    return value() if callable(value) else value


def _opened(
    accelerator: Accelerator, encoder: Encoder, base: BaseConfig, name: str, wanted: Values
) -> tuple[Cache, list[str], list[int]]:
    """Returns the cache, its missing keys, and the processes that share its folder and the work. Collective."""
    said = f"cache {name}: {{:,}} of {len(wanted):,} to encode, in {{}}".format
    if encoder.cache == "memory":
        accelerator.print(said(len(wanted), "memory"))
        return Cache(None), list(wanted), list(range(accelerator.num_processes))
    directory = cache_directory(base)
    kind = encoder.reads.rpartition("_")[2]  # pictures of the class are pictures
    folders = find_folders(accelerator, directory, "base.encoder_cache_dir")
    opened = folders.on_mains(lambda: folder_of(directory, kind, encoder.source()))
    own = directory / opened[folders.number][0].name
    cache = Cache(own, encoder.shapes, encoder.dtype)
    missing = folders.on_mains(lambda: cache.look(wanted))
    strangers = folders.on_mains(lambda: others(own))
    for found in filter(None, strangers):
        accelerator.print(f"WARNING: cache {name}: {found}, who can change what is trained; see base.encoder_cache_dir")
    for place, (folder, changed), lacks in zip(folders.places, opened, missing, strict=True):
        if changed:
            accelerator.print(f"cache {name}: {directory} holds outputs of another encoder, precision or version")
        accelerator.print(said(len(lacks), f"{place}/{folder.name}" if folders.several else folder))
    return cache, missing[folders.number], folders.sharing


def _encode(encoders: FrozenEncoders, name: str, keys: list[str], values: list[Any]) -> Rows:
    """Encodes a batch to rows by key, on the CPU; pictures of different sizes are encoded one by one."""
    parts: list[Any]
    if isinstance(values[0], str):
        parts = [values]
    elif len({value.shape for value in values}) == 1:
        parts = [torch.stack(values)]
    else:
        parts = [value[None] for value in values]
    found = [encoders.run(name, part) for part in parts]
    columns = [[row.cpu() for each in found for row in each[column]] for column in encoders.encoders[name].writes]
    return {key: list(rows) for key, *rows in zip(keys, *columns, strict=True)}
