"""Fills encoders' caches before the first step: every process encodes its share of what is not there yet."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from trainers.engine.agreement import on_main
from trainers.engine.caching import KEY_DIGITS, Cache, KeyedExamples, folder_of, text_key
from trainers.engine.encoding import FrozenStages
from trainers.engine.options import BaseConfig
from trainers.engine.reporting import passing_bar

FILE_BYTES = 64 << 20  # of rows that are written at once


class Picture(NamedTuple):
    """One picture of a data set: its number in a column, plain or mirrored."""

    dataset: Any
    column: str
    number: int
    flipped: bool

    def read(self) -> torch.Tensor:
        return self.dataset.image(self.number, self.flipped, self.column)


def fill_caches(accelerator: Accelerator, stages: FrozenStages, base: BaseConfig, *datasets: Any) -> list[Any]:
    """Fills the caches that the encoders ask for; returns the data sets, with keys instead of cached pictures.

    Encoders leave the device afterwards. Collective. Raises ValueError for a data set that cannot name its content.
    """
    keys: list[dict[str, list[tuple[str, ...]]]] = [{} for _ in datasets]
    for name, encoder in stages.encoders.items():
        if encoder.cache is None:
            continue
        wanted: dict[str, Any] = {text_key(value): value for value in encoder.constants}
        for dataset, columns in zip(datasets, keys, strict=True):
            if dataset is None:
                continue
            if encoder.reads == "caption":
                wanted |= {text_key(text): text for text in _ask(dataset, "captions", name)()}
            elif encoder.reads in _ask(dataset, "picture_columns", name):
                columns[encoder.reads] = _picture_keys(accelerator, dataset, encoder.reads)
                wanted |= {
                    key: Picture(dataset, encoder.reads, number, flipped)
                    for number, both in enumerate(columns[encoder.reads])
                    for flipped, key in enumerate(both)
                }
        stages.caches[name] = _filled(accelerator, stages, base, name, wanted)
        stages.release(name)
    return [KeyedExamples(dataset, found) if found else dataset for dataset, found in zip(datasets, keys, strict=True)]


def _ask(dataset: Any, attribute: str, name: str) -> Any:
    if not hasattr(dataset, attribute):
        lacks = f"a {type(dataset).__name__} has no `{attribute}`, as datasets_lib.dataset.ImageDataset has it"
        raise ValueError(f"encoder {name} cannot be cached: {lacks}; set its cache to null")
    return getattr(dataset, attribute)


def _picture_keys(accelerator: Accelerator, dataset: Any, column: str) -> list[tuple[str, ...]]:
    """The keys of a column's pictures by number; every process hashes its share of the files."""
    rank, world = accelerator.process_index, accelerator.num_processes
    numbers = range(rank, dataset.image_count(column), world)
    bar = passing_bar(accelerator, "hashing pictures")
    own = {n: tuple(key[:KEY_DIGITS] for key in dataset.image_keys(n, column)) for n in bar(numbers)}
    found = {number: keys for part in gather_object([own]) for number, keys in part.items()}
    return [found[number] for number in sorted(found)]


def _filled(
    accelerator: Accelerator, stages: FrozenStages, base: BaseConfig, name: str, wanted: dict[str, Any]
) -> Cache:
    """The encoder's cache with all that is wanted."""
    cache = Cache(_folder(accelerator, stages, base, name))
    missing = on_main(accelerator, lambda: _missing(cache, wanted))
    if cache.folder is not None:
        accelerator.print(f"cache {name}: {len(missing):,} of {len(wanted):,} to encode, in {cache.folder}")
    batches = list(_batches(missing[accelerator.process_index :: accelerator.num_processes], base.train_batch_size))
    rows: dict[str, list[torch.Tensor]] = {}
    for keys in passing_bar(accelerator, f"encoding {name}")(batches):
        rows |= _encode(stages, name, keys, wanted)
        if cache.folder is not None and sum(row.nbytes for each in rows.values() for row in each) > FILE_BYTES:
            cache.add(rows)
            rows = {}
    if cache.folder is None:
        rows = {key: each for part in gather_object([rows]) for key, each in part.items()}
    cache.add(rows)
    accelerator.wait_for_everyone()
    cache.look()
    return cache


def _folder(accelerator: Accelerator, stages: FrozenStages, base: BaseConfig, name: str) -> Path | None:
    encoder = stages.encoders[name]
    if encoder.cache == "memory":
        return None
    directory = Path(base.encoder_cache_dir or Path(base.output_dir).parent / "encoder-cache")
    kind = encoder.reads.rpartition("_")[2]  # pictures of a class are pictures
    folder, changed = on_main(accelerator, lambda: folder_of(directory, kind, encoder.source()))
    if changed:
        accelerator.print(f"cache {name}: what {directory} holds is of another encoder, precision or version")
    return folder


def _missing(cache: Cache, wanted: dict[str, Any]) -> list[str]:
    cache.look()
    return [key for key in wanted if key not in cache]


def _batches(keys: list[str], size: int) -> Iterator[list[str]]:
    return (keys[start : start + size] for start in range(0, len(keys), size))


def _encode(stages: FrozenStages, name: str, keys: list[str], wanted: dict[str, Any]) -> dict[str, list[torch.Tensor]]:
    """The rows of a batch by key, on the CPU; pictures of different sizes are encoded one by one."""
    values = [wanted[key].read() if isinstance(wanted[key], Picture) else wanted[key] for key in keys]
    if isinstance(values[0], str):
        parts = [values]
    elif len({value.shape for value in values}) == 1:
        parts = [torch.stack(values)]
    else:
        parts = [value[None] for value in values]
    found = [stages.run(name, part) for part in parts]
    columns = [[row.cpu() for each in found for row in each[column]] for column in stages.encoders[name].writes]
    return {key: list(rows) for key, *rows in zip(keys, *columns, strict=True)}
