"""Pictures of noise in memory, as a data set that a run of the benchmark names."""

from __future__ import annotations

from typing import Any

import numpy as np

from datasets_lib.images.image_dataset import ImageDataset
from datasets_lib.images.source import Source

DATASET = f"{__name__}:build"


def build(args: Any, split: str, count: int, classes: int = 0) -> ImageDataset:
    """Build `count` pictures of the run's size, with labels of so many classes, if any."""
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, (count, args.resolution, args.resolution, args.channels), dtype=np.uint8)
    images = pixels[..., 0] if args.channels == 1 else pixels
    known: dict[str, Any] = {}
    if classes:
        known = {"labels": [n % classes for n in range(count)], "label_names": [f"class {n}" for n in range(classes)]}
    return ImageDataset(
        Source(images, "noise", f"noise-{count}-{args.resolution}-{args.channels}", **known), args, split
    )
