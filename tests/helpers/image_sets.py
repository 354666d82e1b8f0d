"""Data sets of pictures in memory, the settings they are built with, and one that is built by its name."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image

from datasets_lib.images.image_dataset import ImageDataset
from datasets_lib.images.source import Source
from trainers.engine.config.base_options import BaseConfig

DEFAULTS = {"encoder_cache_dir": "outputs/tests/encoder-cache", "resolution": 16, "caption": ""}


def settings(**changed):
    return BaseConfig(**{**DEFAULTS, **changed})


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def random_images(count, same_size=False):
    draw = np.random.default_rng(0)
    sizes = [(24, 30)] * count if same_size else draw.integers(17, 40, (count, 2))
    return [draw.integers(0, 256, (height, width, 3), dtype=np.uint8) for height, width in sizes]


def memory_source(images, **known):
    return Source(images, "memory", "0", **known)


def image_dataset(images, split="train", known=None, **changed):
    return ImageDataset(memory_source(images, **(known or {})), settings(**changed), split)


def assert_same(left, right):
    assert left.keys() == right.keys()
    for key, value in left.items():
        same = torch.equal(value, right[key]) if isinstance(value, torch.Tensor) else value == right[key]
        assert same, key


class Own:
    """The smallest data set that keeps the contract."""

    fingerprint = "own"

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def get(self, index, generator):
        return {"image": torch.zeros(1, 8, 8)}


def build_for_test(args, split, size=3):
    return Own(size)


def encoded(images, broken=()):
    files = []
    for number, image in enumerate(images):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "png")
        files.append(file.getvalue()[:100] if number in broken else file.getvalue())
    return files
