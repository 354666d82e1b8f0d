"""What tasks with classes share: how many there are, and the labels of a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainers.base import Trainer

if TYPE_CHECKING:
    from torch import Tensor


def count_classes(task: str, trainer: Trainer, num_classes: int | None) -> int:
    """As many classes as the data set names, or as the option says; ValueError where they disagree or both are silent.

    A data set without names must not hold labels beyond the option.
    """
    named, highest = len(trainer.run.label_names or []), trainer.run.highest_label
    if named and num_classes and named != num_classes:
        raise ValueError(f"{task}.num_classes = {num_classes}: the data set names {named} classes; set it to null")
    if not (named or num_classes):
        raise ValueError(f"{task}.num_classes = null: the data set names no classes; say how many it has")
    if highest is not None and highest >= (num_classes or named):
        wanted = f"the data set has the label {highest}; it must be at least {highest + 1}"
        raise ValueError(f"{task}.num_classes = {num_classes or named}: {wanted}")
    return num_classes or named


def labels_of(task: str, batch: dict[str, Any]) -> Tensor:
    """The labels [B] of a batch; ValueError for data without any."""
    if "label" not in batch:
        raise ValueError(f"{task} needs labels, and the data set has none; give a folder per class")
    return batch["label"]
