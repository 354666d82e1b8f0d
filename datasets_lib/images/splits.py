"""Which rows of a source are trained on, and which are held out."""

from __future__ import annotations

from typing import Any

import torch


def select_rows(count: int, args: Any, split: str) -> list[int]:
    """Return the rows of a split in order: a held-out fraction and `max_train_samples` follow from `args.seed`."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(args.seed)).tolist()
    held_out = 0
    fraction = args.validation_split
    if fraction is not None and not isinstance(fraction, str):
        held_out = max(1, round(fraction * count))
        if not 0 < fraction < 1 or held_out >= count:
            raise ValueError(
                f"base.validation_split is {fraction} of {count} images; give a sub-folder or split, or a fraction "
                "between 0 and 1 that leaves images to train on"
            )
    if split == "validation":
        return sorted(order[:held_out] if held_out else order)
    return sorted(order[held_out:][: args.max_train_samples])
