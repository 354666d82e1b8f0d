"""Writes folders of pictures and their metadata, and reads data sets of them."""

from __future__ import annotations

import json

import numpy as np
from image_sets import settings
from PIL import Image

import datasets_lib


def save(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((16, 16, 3), value, dtype=np.uint8)).save(path)


def write(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")


def build(folder, split="train", **changed):
    return datasets_lib.build(settings(train_data_dir=str(folder), **changed), split)


def examples(dataset):
    return [dataset.get(index, None) for index in range(len(dataset))]


def values(dataset):
    """The grey value of each image, which tells the test's images apart."""
    return [round(float(example["image"].mean() + 1) * 127.5) for example in examples(dataset)]


def captions(dataset):
    return [example["caption"] for example in examples(dataset)]


def labels(dataset):
    return [example.get("label") for example in examples(dataset)]
