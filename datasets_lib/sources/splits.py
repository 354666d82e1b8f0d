"""Which part of a folder is which split: a sub-folder that is named, or sub-folders called train, test and the like."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from datasets_lib.checks import one_of
from datasets_lib.errors import InputError
from datasets_lib.foreign import entries, shown

TRAIN = ("train", "training")
HELD_OUT = ("test", "testing", "val", "valid", "validation")


def split_of(file: Path, top: Path) -> str | None:
    """Return the split that a file's folders or the beginning of its name say, such as `train-00000-of-2.parquet`."""
    parts = file.relative_to(top).parts
    for name in (*parts[:-1], re.split("[-_.]", parts[-1])[0]):
        if name.lower() in (*TRAIN, *HELD_OUT):
            return name
    return None


def split_folder(top: Path, validation_split: Any, split: str) -> tuple[Path, Path | None]:
    """Return the folder of a split, and the sub-folder to leave out of it."""
    if not isinstance(validation_split, str):
        return top, None
    folders = [path.name for path in entries(top) if path.is_dir() and path.name != "train"]
    held_out = top / one_of(f"base.validation_split (a sub-folder of {top})", validation_split, folders)
    if split == "validation":
        return held_out, None
    return (top / "train", None) if (top / "train").is_dir() else (top, held_out)


def training_folder(top: Path, images: Iterable[Path]) -> tuple[Path, list[str]]:
    """Return where to train if no split is named, and a note: `train`, if all images are in folders of splits.

    Raises InputError where some are in a folder that holds out images elsewhere, such as `test`: nobody trains on those
    without saying so. A class may be called train.
    """
    begin = len(str(top)) + 1
    below = {str(path)[begin:].partition("/")[:2] for path in images}  # the first folder, or a file at the top
    firsts = {name for name, slash in below if slash}
    at_top = len(firsts) < len(below)
    train = sorted(name for name in firsts if name.lower() in TRAIN)
    held_out = sorted(name for name in firsts if name.lower() in HELD_OUT)
    if len(train) == 1 and firsts == {*train, *held_out} and not at_top:
        left = f", and not on {', '.join(held_out)}: name one in base.validation_split" if held_out else ""
        return top / train[0], [f"trains on the sub-folder {train[0]} of {shown(top)}{left}"]
    if not held_out:
        return top, []
    raise InputError(
        f"base.train_data_dir = {shown(top)} has images in {', '.join(map(shown, held_out))}, which is what splits to "
        f"hold out are called, beside others; say base.validation_split={shown(held_out[0])} to validate on it, give a "
        "folder of training images alone, or rename it if it is a class"
    )
