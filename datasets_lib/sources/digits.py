"""scikit-learn's 1,797 handwritten digits, 8 x 8: a data set that needs no download."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, files
from typing import Any

import numpy as np

from datasets_lib.images.image_dataset import ImageDataset
from datasets_lib.images.source import Source, digest, refuse_named_split

NAMES = [str(digit) for digit in range(10)]
FILE = "sklearn/datasets/data/digits.csv.gz"


def build(args: Any, split: str) -> ImageDataset:
    """Build the digits, labelled "0" to "9"."""
    refuse_named_split(args, "base.dataset=digits")
    values, labels = read_digits()
    pixels = np.rint(values * (255 / 16)).astype(np.uint8)
    fingerprint = digest(pixels.tobytes(), labels)
    return ImageDataset(Source(pixels, "digits", fingerprint, labels=labels, label_names=NAMES), args, split)


def read_digits() -> tuple[np.ndarray, list[int]]:
    """Return the digits [1797, 8, 8], 0 to 16, and their labels.

    The library's file is read without it where it is found: importing scikit-learn takes longer than a tiny run.
    """
    try:
        found = [file.locate() for file in files("scikit-learn") or () if str(file) == FILE]
    except PackageNotFoundError:
        found = []
    if not found:
        from sklearn.datasets import load_digits

        digits = load_digits()
        return digits.images, digits.target.tolist()
    rows = np.loadtxt(str(found[0]), delimiter=",")
    return rows[:, :-1].reshape(-1, 8, 8), rows[:, -1].astype(int).tolist()
