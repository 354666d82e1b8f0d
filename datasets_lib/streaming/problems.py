"""Options that do not work with a stream, whose examples are not numbered."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

# options that must have these values, and why
FIXED = {
    "dataset": (None, "a stream is read from train_data_dir or dataset_name; name one of them"),
    "num_epochs": (None, "a stream's examples are not counted; set max_train_steps"),
    "valid_epochs": (None, "a stream's examples are not counted; set valid_steps"),
    "save_model_epochs": (None, "a stream's examples are not counted; set save_model_steps"),
    "max_train_samples": (None, "a stream has no random subset; give it fewer shards"),
    "class_data_dir": (None, "a stream cannot be paired with pictures of a class; set it to null"),
    "buckets": (False, "a stream's pictures come as they are, and a batch has one size; set it to false"),
    "eval_steps": (None, "compares with the training set's pictures; measure with scripts/evaluate.py --real"),
}


def problems(args: Any) -> Iterator[tuple[str, str]]:
    """Yield (option, what is wrong) for settings that do not go with `streaming: true`."""
    if not args.streaming:
        return
    for option, (value, reason) in FIXED.items():
        if getattr(args, option) != value:
            yield option, f"with streaming: true {reason}"
    if isinstance(args.train_data_dir, list):
        yield "train_data_dir", "with streaming: true must be one folder of shards, or a .txt file that lists them"
    if args.validation_split is not None and not isinstance(args.validation_split, str):
        yield "validation_split", "with streaming: true must name a sub-folder or a split: no fraction can be held out"
    if args.image_cache_mb not in (0, 512):  # the default
        yield "image_cache_mb", "has no effect with streaming: true"
