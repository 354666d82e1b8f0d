"""A data set of pictures as shards: parquet with the hub's features, or tar files in WebDataset's layout."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from datasets_lib.errors import InputError
from datasets_lib.foreign import read_bytes, shown
from datasets_lib.images.decode import open_image
from datasets_lib.images.files import PICTURE_BYTES
from datasets_lib.images.formats import ENCODED_EXTENSIONS
from datasets_lib.images.image_dataset import ImageDataset
from datasets_lib.images.source import Source
from datasets_lib.streaming.raw_row import LATENTS, MASK
from datasets_lib.streaming.tar_rows import LABEL

ROW_GROUP = 100  # examples of parquet, which are read together
SUFFIXES = {"parquet": ".parquet", "webdataset": ".tar"}
Columns = dict[str, Any]  # of one example, those that it has: image, mask and latents as files, text, label


def example_of(dataset: ImageDataset, index: int, latents: bytes | None = None) -> Columns:
    """Return the files of an example as they are, or its latents instead of its picture and mask."""
    source, row = dataset.source, dataset.rows[index]
    found = {"image": source.images, MASK: source.masks} if latents is None else {}
    found |= {"text": source.captions, "label": source.labels}
    columns = {name: rows[row] for name, rows in found.items() if rows is not None}
    if source.trigger_words is not None and "text" in columns:  # those of folders; a run has one for all
        columns["text"] = dataset.texts.with_words(row)
    columns |= {kind: _file(columns[kind], source.name(row)) for kind in ("image", MASK) if kind in columns}
    return columns if latents is None else {**columns, LATENTS: latents}


def _file(image: Path | bytes | np.ndarray, name: str) -> bytes:
    if isinstance(image, Path) and image.suffix.lower() in ENCODED_EXTENSIONS:
        return read_bytes(image, PICTURE_BYTES)  # a stream reads no larger ones
    if isinstance(image, bytes):
        if len(image) > PICTURE_BYTES:
            raise InputError(
                f"{shown(name)}: has {len(image):,} bytes, and a shard's picture at most {PICTURE_BYTES:,}"
            )
        return image
    data = io.BytesIO()
    with open_image(image) if isinstance(image, Path) else Image.fromarray(image) as picture:
        picture.save(data, "PNG", exif=picture.getexif(), icc_profile=picture.info.get("icc_profile"))
    return data.getvalue()


def write_shard(path: Path, examples: Iterable[Columns], kind: str, source: Source) -> None:
    """Write a shard of the kind "parquet" or "webdataset"; `source` is that of all examples."""
    if kind == "parquet":
        _write_parquet(path, iter(examples), source)
    else:
        _write_tar(path, examples)


def _write_parquet(path: Path, examples: Iterator[Columns], source: Source) -> None:
    import datasets
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    rows = list(islice(examples, ROW_GROUP))
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
            table = [_parquet_row(row, several) for row in rows]
            writer.write_table(pyarrow.Table.from_pylist(table, schema=schema))
            rows = list(islice(examples, ROW_GROUP))


def _parquet_row(example: Columns, several: bool) -> Columns:
    pictures = {name: {"bytes": example[name], "path": None} for name in ("image", MASK) if name in example}
    lists = {"text": [example["text"]]} if several and isinstance(example["text"], str) else {}
    return {**example, **pictures, **lists}


def _write_tar(path: Path, examples: Iterable[Columns]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for number, example in enumerate(examples):
            for end, data in _members(example):
                info = tarfile.TarInfo(f"{number:08}.{end}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
            archive.members.clear()  # type: ignore[attr-defined]  # typeshed has no members; it would keep them all


def _members(example: Columns) -> Iterator[tuple[str, bytes]]:
    for column, before in (("image", ""), (MASK, f"{MASK}.")):
        if column in example:
            yield before + _end(example[column]), example[column]
    if LATENTS in example:
        yield LATENTS, example[LATENTS]
    if "label" in example:
        yield LABEL, str(example["label"]).encode()
    if isinstance(caption := example.get("text"), str):
        yield "txt", caption.encode()
    elif caption is not None:
        yield "json", json.dumps({"text": caption}).encode()


def _end(data: bytes) -> str:
    """The end of a picture's name; png if Pillow does not know its format, as readers look at the content."""
    try:
        with open_image(data) as image:
            end = (image.format or "").lower()
    except (OSError, Image.DecompressionBombError):
        end = "png"
    return end if f".{end}" in ENCODED_EXTENSIONS else "png"
