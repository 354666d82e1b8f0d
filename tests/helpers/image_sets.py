"""Data sets of pictures in memory, the settings they are built with, and one that is built by its name."""

from __future__ import annotations

import io
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from datasets_lib.images.image_dataset import ImageDataset
from datasets_lib.images.source import Source

DEFAULTS = {
    "seed": 0,
    "dataset_name": None,
    "dataset_config_name": None,
    "train_data_dir": None,
    "dataset": None,
    "dataset_args": {},
    "cache_dir": None,
    "encoder_cache_dir": "outputs/tests/encoder-cache",
    "allow_outside": [],
    "image_column": None,
    "label_column": None,
    "caption_column": None,
    "caption": "",
    "trigger_word": None,
    "shuffle_tags": False,
    "keep_tags": 0,
    "mask_column": None,
    "class_data_dir": None,
    "class_caption": None,
    "validation_split": None,
    "max_train_samples": None,
    "resolution": 16,
    "buckets": False,
    "bucket_max_pixels": None,
    "bucket_step": 64,
    "channels": 3,
    "interpolation": "bilinear",
    "center_crop": False,
    "random_flip": False,
    "background_color": "white",
    "bad_images": "error",
    "max_image_pixels": 64_000_000,
    "convert_to_srgb": True,
    "image_cache_mb": 512,
    "streaming": False,
}


def settings(**changed):
    return SimpleNamespace(**{**DEFAULTS, **changed})


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
