"""scikit-learn's 1,797 handwritten digits, 8 x 8: a data set that needs no download."""

from __future__ import annotations

from typing import Any

import numpy as np

from datasets_lib.images.image_dataset import ImageDataset
from datasets_lib.images.source import Source, digest, refuse_named_split

NAMES = [str(digit) for digit in range(10)]


def build(args: Any, split: str) -> ImageDataset:
    """Build the digits, labelled "0" to "9"."""
    from sklearn.datasets import load_digits

    refuse_named_split(args, "base.dataset=digits")
    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    labels = digits.target.tolist()
    fingerprint = digest(pixels.tobytes(), labels)
    return ImageDataset(Source(pixels, "digits", fingerprint, labels=labels, label_names=NAMES), args, split)
