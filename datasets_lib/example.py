"""The example contract, checked once on the first example."""

from __future__ import annotations

from typing import Any

import torch


def check_example(example: Any, args: Any) -> None:
    """Raise a ValueError that says what is wrong with an example and what was expected."""
    encoded = isinstance(example, dict) and {"mean", "logvar"} <= example.keys()
    if not encoded and not (isinstance(example, dict) and "image" in example):
        found = sorted(example) if isinstance(example, dict) else type(example).__name__
        raise ValueError(
            f"an example must be a dict with the key 'image', or 'mean' and 'logvar' of latents, got {found}; see the "
            "data set's get()"
        )
    if encoded:
        _check_latents(example["mean"], example["logvar"])
    if "image" in example:
        _check_image(example["image"], (args.channels, args.resolution, args.resolution))
    label = example.get("label", 0)
    if type(label) is not int or label < 0:
        raise ValueError(f"an example's label must be an int of at least 0, got {label!r} ({type(label).__name__})")
    caption = example.get("caption", "")
    if not isinstance(caption, str):
        raise ValueError(f"an example's caption must be a str, got {caption!r} ({type(caption).__name__})")


def _check_latents(mean: Any, logvar: Any) -> None:
    for name, rows in (("mean", mean), ("logvar", logvar)):
        if not isinstance(rows, torch.Tensor) or rows.dtype != torch.float32 or rows.shape != mean.shape:
            found = f"{getattr(rows, 'dtype', type(rows).__name__)} {list(getattr(rows, 'shape', []))}"
            raise ValueError(f"an example's mean and logvar must be float32 tensors of one shape, {name} is {found}")
        if not torch.isfinite(rows).all():
            raise ValueError(f"an example's {name} holds NaN or infinity; every value must be finite")


def _check_image(image: Any, shape: tuple[int, int, int]) -> None:
    if not isinstance(image, torch.Tensor) or image.dtype != torch.float32:
        found = getattr(image, "dtype", type(image).__name__)
        raise ValueError(f"an example's image must be a float32 tensor, got {found}")
    if tuple(image.shape) != shape:
        raise ValueError(
            f"an example's image has shape {list(image.shape)}, expected {list(shape)} "
            "from base.channels, base.resolution, base.resolution"
        )
    if not torch.isfinite(image).all():
        raise ValueError("an example's image holds NaN or infinity; every value must be finite")
    low, high = image.min().item(), image.max().item()
    if low < -1 or high > 1:
        raise ValueError(f"an example's image has values from {low:g} to {high:g}, expected [-1, 1]: x / 127.5 - 1")
