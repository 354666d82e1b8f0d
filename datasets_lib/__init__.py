"""Data sets by name, by folder, or by hub name, all with the same small contract."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from inspect import signature
from typing import Any, Literal, overload

from PIL import ImageColor

from datasets_lib.checks import one_of
from datasets_lib.errors import InputError
from datasets_lib.example import DataSet, Example, ImageData
from datasets_lib.example_checks import check_example
from datasets_lib.foreign import named_object
from datasets_lib.images import buckets
from datasets_lib.sources import concept
from datasets_lib.streaming import problems as stream_problems

__all__ = [
    "DATASETS",
    "DataSet",
    "Example",
    "ImageData",
    "build",
    "check_captions",
    "check_example",
    "prepare",
    "problems",
]

DATASETS = {"digits": "datasets_lib.sources.digits:build"}


def problems(args: Any) -> Iterator[tuple[str, str]]:
    """Yield (option, what is wrong) for settings that fail whatever the data is."""
    try:
        if args.dataset is not None and ":" not in args.dataset:
            one_of("base.dataset", args.dataset, DATASETS, "package.module:build")
    except ValueError as error:
        yield "dataset", str(error).partition("; ")[2]
    try:
        ImageColor.getrgb(args.background_color)
    except ValueError:
        yield "background_color", "must be a colour: a name such as white, or #rrggbb"
    if isinstance(args.train_data_dir, list):
        yield from (("train_data_dir", problem) for problem in concept.problems(args.train_data_dir))
    yield from buckets.problems(args)
    yield from stream_problems.problems(args)


@overload
def build(args: Any, split: Literal["train"]) -> ImageData: ...


@overload
def build(args: Any, split: str) -> ImageData | None: ...


def build(args: Any, split: str) -> ImageData | None:
    """Build the data set of a split, "train" or "validation".

    Returns None for "validation" when `args.validation_split` is None. Raises ValueError for a setting that cannot be
    met and FileNotFoundError for data that is not there.
    """
    from datasets_lib.sources import class_images, concepts, folder, hub  # not at the top: a config needs no torch
    from datasets_lib.streaming import stream

    one_of("split", split, ("train", "validation"))
    if split == "validation" and args.validation_split is None:
        return None
    if args.streaming:
        return stream.build(args, split)
    if args.dataset is not None:
        dataset = _call(_named_builder(args.dataset), args, split)
    elif isinstance(args.train_data_dir, list):
        dataset = concepts.build(args, split)
    else:
        dataset = (hub if args.train_data_dir is None else folder).build(args, split)
    if dataset is not None and split == "train" and args.has_class_images:
        return class_images.with_prior(dataset, args)
    return dataset


def check_captions(*datasets: ImageData | None) -> None:
    """Raise InputError for a data set with what looks like captions and is not read, for tasks that read them."""
    for dataset in datasets:
        if dataset is not None and dataset.caption_problem is not None:
            raise InputError(dataset.caption_problem)


def prepare(*datasets: ImageData | None, show_progress: bool, num_classes: int | None = None) -> dict[str, float]:
    """Decode images ahead if they fit `image_cache_mb`, and limit labels; once, before loader workers start.

    Returns the time it took as metrics "prepare_train/seconds" and "prepare_validation/seconds".
    """
    seconds = {}
    for split, dataset in zip(("train", "validation"), datasets, strict=False):
        if dataset is not None:
            dataset.limit_labels(num_classes)
            began = time.perf_counter()
            dataset.prepare(show_progress)
            seconds[f"prepare_{split}/seconds"] = time.perf_counter() - began
    return seconds


def _named_builder(name: str) -> Callable:
    target = name if ":" in name else DATASETS[one_of("base.dataset", name, DATASETS, "package.module:build")]
    try:
        return named_object(target)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"base.dataset is {name!r}, which cannot be imported ({error}); give package.module:build, "
            "with the package installed or its folder on PYTHONPATH"
        ) from error


def _call(builder: Callable, args: Any, split: str) -> ImageData | None:
    from datasets_lib.own_data import adapted

    try:
        signature(builder).bind(args, split, **args.dataset_args)
    except TypeError as error:
        accepted = ", ".join(list(signature(builder).parameters)[2:]) or "none"
        raise InputError(
            f"base.dataset_args is {args.dataset_args}, which base.dataset={args.dataset} does not take ({error}); "
            f"its arguments: {accepted}"
        ) from error
    dataset = builder(args, split, **args.dataset_args)
    needed = ("__len__", "get", "fingerprint", *(("bucket_of",) if args.buckets else ()))
    if dataset is None and split == "validation":
        return None
    lacking = [name for name in needed if not hasattr(dataset, name)]
    if not lacking and not isinstance(dataset.fingerprint, str):
        lacking = ["a fingerprint that is text"]
    if lacking:
        raise InputError(
            f"base.dataset={args.dataset} returned a {type(dataset).__name__} without {', '.join(lacking)}; "
            "a data set has __len__, get(index, generator) and fingerprint, a text that changes with its content, and "
            "for base.buckets bucket_of(index), a number that examples of one size share"
        )
    return dataset if isinstance(dataset, ImageData) else adapted(dataset, args, split)
