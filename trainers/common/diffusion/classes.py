"""Classes: how many there are, their numbers by name, and the labels of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from datasets_lib.errors import InputError
from datasets_lib.foreign import shown
from trainers.base import Trainer

if TYPE_CHECKING:
    from torch import Tensor


def count_classes(task: str, trainer: Trainer, num_classes: int | None) -> int:
    """Counts the classes that the data set names, or else takes the option.

    Raises ValueError if they disagree, if neither is given, or if the data set has a label beyond the count.
    """
    named, highest = len(trainer.run.label_names or []), trainer.run.highest_label
    if trainer.run.no_labels and not named and highest is None:
        raise InputError(f"{task} needs labels, and the data set has none: {trainer.run.no_labels}")
    if named and num_classes and named != num_classes:
        raise InputError(f"{task}.num_classes = {num_classes}: the data set names {named} classes; set it to null")
    if not (named or num_classes):
        raise InputError(f"{task}.num_classes = null: the data set names no classes; say how many it has")
    if highest is not None and highest >= (num_classes or named):
        wanted = f"the data set has the label {highest}; it must be at least {highest + 1}"
        raise InputError(f"{task}.num_classes = {num_classes or named}: {wanted}")
    return num_classes or named


def class_numbers(option: str, classes: Sequence[str | int], names: list[str], num_classes: int) -> list[int]:
    """Resolves names and numbers as the pipeline does; ValueError, naming the `option`, for any other class."""
    from trainers.common.class_pipeline import find_classes

    try:
        return find_classes(option, classes, names, num_classes)
    except ValueError as error:
        raise InputError(shown(error)) from None


def labels_of(task: str, batch: dict[str, Any]) -> Tensor:
    """Returns the labels [B] of a batch; ValueError for data without labels."""
    if "label" not in batch:
        raise InputError(f"{task} needs labels, and the data set has none; give a folder per class")
    return batch["label"]
