"""A data set of pictures as shards: parquet with the hub's features, or tar files in WebDataset's layout."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from datasets_lib.images.image_dataset import ImageDataset
from datasets_lib.images.source import Source
from datasets_lib.sources.folder import EXTENSIONS
from datasets_lib.streaming.rows import LABEL, LATENTS, MASK

ROW_GROUP = 100  # examples of parquet that are read at once to reach one of them
SUFFIXES = {"parquet": ".parquet", "webdataset": ".tar"}


class Written(NamedTuple):
    """One example as it is written; what the data set does not have is None."""

    image: bytes | None
    mask: bytes | None
    caption: str | list[str] | None
    label: int | None
    latents: bytes | None  # a safetensors file of mean and logvar


def example_of(dataset: ImageDataset, index: int, latents: bytes | None = None) -> Written:
    """Return the files of an example as they are, or its latents instead of its picture and mask."""
    source, row = dataset.source, dataset.rows[index]
    return Written(
        _file(source.images[row]) if latents is None else None,
        _file(source.masks[row]) if latents is None and source.masks is not None else None,
        source.captions[row] if source.captions is not None else None,
        source.labels[row] if source.labels is not None else None,
        latents,
    )


def _file(image: Path | bytes | np.ndarray) -> bytes:
    if isinstance(image, Path):
        return image.read_bytes()
    if isinstance(image, bytes):
        return image
    data = io.BytesIO()
    Image.fromarray(image).save(data, "PNG")
    return data.getvalue()


def write_shard(path: Path, examples: Iterable[Written], kind: str, source: Source) -> None:
    """Write a shard of the kind "parquet" or "webdataset"; `source` is that of all examples."""
    if kind == "parquet":
        _write_parquet(path, iter(examples), source)
    else:
        _write_tar(path, examples)


def _write_parquet(path: Path, examples: Iterator[Written], source: Source) -> None:
    import datasets
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    rows = [_parquet_row(example) for example in islice(examples, ROW_GROUP)]
    text, names = datasets.Value("string"), source.label_names
    several = any(isinstance(caption, list) for caption in source.captions or ())
    kinds = {
        "image": datasets.Image(),
        MASK: datasets.Image(),
        "text": datasets.List(text) if several else text,
        "label": datasets.ClassLabel(names=names) if names else datasets.Value("int64"),
        LATENTS: datasets.Value("binary"),
    }
    schema = datasets.Features({name: kinds[name] for name in rows[0]}).arrow_schema
    with ParquetWriter(path, schema, use_dictionary=False) as writer:
        while rows:
            if several:
                rows = [_with_list(row) for row in rows]
            writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))
            rows = [_parquet_row(example) for example in islice(examples, ROW_GROUP)]


def _parquet_row(example: Written) -> dict[str, Any]:
    row = {
        "image": None if example.image is None else {"bytes": example.image, "path": None},
        MASK: None if example.mask is None else {"bytes": example.mask, "path": None},
        "text": example.caption,
        "label": example.label,
        LATENTS: example.latents,
    }
    return {name: value for name, value in row.items() if value is not None}


def _with_list(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"text": [row["text"]] if isinstance(row["text"], str) else row["text"]}


def _write_tar(path: Path, examples: Iterable[Written]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for number, example in enumerate(examples):
            for end, data in _members(example):
                info = tarfile.TarInfo(f"{number:08}.{end}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
            archive.members.clear()  # type: ignore[attr-defined]  # typeshed has no members; it would keep them all


def _members(example: Written) -> Iterator[tuple[str, bytes]]:
    if example.image is not None:
        yield _end(example.image), example.image
    if example.mask is not None:
        yield f"{MASK}.{_end(example.mask)}", example.mask
    if example.latents is not None:
        yield LATENTS, example.latents
    if example.label is not None:
        yield LABEL, str(example.label).encode()
    if isinstance(example.caption, str):
        yield "txt", example.caption.encode()
    elif example.caption is not None:
        yield "json", json.dumps({"text": example.caption}).encode()


def _end(data: bytes) -> str:
    """The end of a picture's name; of one that Pillow does not know some end, as its reader looks at the content."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            end = (image.format or "").lower()
    except OSError:
        end = "png"
    return end if f".{end}" in EXTENSIONS else "png"
