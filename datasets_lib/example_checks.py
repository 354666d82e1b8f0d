"""Checks the first example of a data set, once, and says what is wrong with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets_lib.errors import InputError
from datasets_lib.images.buckets import Size, sizes_of


def check_example(example: Any, args: Any) -> None:
    """Raises a ValueError that says what is wrong with an example and what was expected."""
    encoded = isinstance(example, dict) and {"mean", "logvar"} <= example.keys()
    if not encoded and not (isinstance(example, dict) and "image" in example):
        found = sorted(example) if isinstance(example, dict) else type(example).__name__
        raise InputError(
            f"an example must be a dict with the key 'image', or 'mean' and 'logvar' of latents, got {found}; see the "
            "data set's get()"
        )
    if encoded:
        _check_latents(example["mean"], example["logvar"])
    sizes, source = sizes_of(args), "the buckets" if args.buckets else "base.resolution, base.resolution"
    for name in ("image", "class_image"):
        if name in example:
            _check_pixels(name, example[name], args.channels, sizes, f"base.channels, {source}", "x / 127.5 - 1", -1)
    if "mask" in example:
        of_image = sizes if encoded else (tuple(example["image"].shape[1:]),)
        _check_pixels("mask", example["mask"], 1, of_image, f"1, {source}", "x / 255", 0)
    for name, least in (("original_size", 1), ("crop_top_left", 0)):
        for key in {name, f"class_{name}"} & example.keys():
            _check_pair(key, example[key], least)
    label = example.get("label", 0)
    if type(label) is not int or label < 0:
        raise InputError(f"an example's label must be an int of at least 0, got {label!r} ({type(label).__name__})")
    for name in ("caption", "class_caption"):
        caption = example.get(name, "")
        if not isinstance(caption, str):
            raise InputError(f"an example's {name} must be a str, got {caption!r} ({type(caption).__name__})")


def _check_latents(mean: Any, logvar: Any) -> None:
    import torch

    for name, rows in (("mean", mean), ("logvar", logvar)):
        if not isinstance(rows, torch.Tensor) or rows.dtype != torch.float32 or rows.shape != mean.shape:
            found = f"{getattr(rows, 'dtype', type(rows).__name__)} {list(getattr(rows, 'shape', []))}"
            raise InputError(f"an example's mean and logvar must be float32 tensors of one shape, {name} is {found}")
        if not torch.isfinite(rows).all():
            raise InputError(f"an example's {name} holds NaN or infinity; every value must be finite")


def _check_pixels(
    name: str, image: Any, channels: int, sizes: Sequence[Size], source: str, formula: str, least: int
) -> None:
    import torch

    if not isinstance(image, torch.Tensor) or image.dtype != torch.float32:
        found = getattr(image, "dtype", type(image).__name__)
        raise InputError(f"an example's {name} must be a float32 tensor, got {found}")
    expected = [[channels, *size] for size in sizes]
    if list(image.shape) not in expected:
        shapes = " or ".join(map(str, expected))
        raise InputError(f"an example's {name} has shape {list(image.shape)}, expected {shapes} from {source}")
    if not torch.isfinite(image).all():
        raise InputError(f"an example's {name} holds NaN or infinity; every value must be finite")
    low, high = image.min().item(), image.max().item()
    if low < least or high > 1:
        raise InputError(f"an example's {name} has values from {low:g} to {high:g}, expected [{least}, 1]: {formula}")


def _check_pair(name: str, pair: Any, least: int) -> None:
    import torch

    whole = isinstance(pair, torch.Tensor) and pair.dtype == torch.int64 and list(pair.shape) == [2]
    if not whole or pair.min() < least:
        raise InputError(
            f"an example's {name} must be an int64 tensor of 2 numbers of at least {least}, vertical and horizontal, "
            f"got {pair!r}"
        )
