"""Folders of small shards for tests: pictures whose one grey value, label and caption say which example they are."""

from __future__ import annotations

import io
import json
import tarfile

import datasets
import numpy as np
from PIL import Image

SIDE = 16


def png(number, side=SIDE):
    """A grey picture: its value is the example's number."""
    data = io.BytesIO()
    Image.fromarray(np.full((side, side), number, dtype=np.uint8)).save(data, "PNG")
    return data.getvalue()


def caption(number):
    return f"picture {number}"


def write_parquet(path, numbers, group=4, **columns):
    """Example n of the numbers has picture n, label n mod 10 and its caption; `columns` are further ones."""
    features = {"image": datasets.Image(), "label": datasets.Value("int64"), "text": datasets.Value("string")}
    features |= {name: kind for name, (kind, _) in columns.items()}
    rows = {
        "image": [{"bytes": png(number), "path": None} for number in numbers],
        "label": [number % 10 for number in numbers],
        "text": [caption(number) for number in numbers],
    } | {name: values for name, (_, values) in columns.items()}
    datasets.Dataset.from_dict(rows, datasets.Features(features)).to_parquet(path, batch_size=group)


def write_tar(path, members):
    """The members {name: bytes} in their order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def tar_members(numbers):
    found = {}
    for number in numbers:
        found[f"part/{number:04}.png"] = png(number)
        found[f"part/{number:04}.cls"] = str(number % 10).encode()
        found[f"part/{number:04}.json"] = json.dumps({"text": caption(number), "score": 0.5}).encode()
    return found


def write_shards(folder, kind, sizes):
    """shard-000.<kind>, ... of so many examples each, which are numbered from 0 on through all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    first = 0
    for shard, size in enumerate(sizes):
        path, numbers = folder / f"shard-{shard:03}.{kind}", range(first, first + size)
        if kind == "parquet":
            write_parquet(path, numbers)
        else:
            write_tar(path, tar_members(numbers))
        first += size
    return folder


def broken(folder, number, keep=0.5):
    """Cuts a shard off in its middle."""
    path = sorted(folder.iterdir())[number]
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    return path


def listed(tmp_path, *lines):
    file = tmp_path / "shards.txt"
    file.write_text("# shards\n" + "".join(f"{line}\n\n" for line in lines))
    return file
