"""Which part of a folder is which split: a sub-folder that is named, or folders and shards called train, test, ..."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from datasets_lib.checks import one_of
from datasets_lib.errors import InputError
from datasets_lib.foreign import entries, is_folder, shown

TRAIN = ("train", "training")
HELD_OUT = (
    "test", "testing", "val", "valid", "validation", "dev", "eval", "evaluation", "holdout", "held_out", "heldout",
)  # fmt: skip
# as a word of a name, such as test in cifar10-test.parquet, train2017 or seg_test
WORD = re.compile(rf"(?:^|[-._0-9/])({'|'.join((*TRAIN, *HELD_OUT))})(?=[-._0-9/]|$)")


def split_of(file: Path, top: Path) -> str | None:
    """Return the split that a file's name and folders below `top` say; the last word counts."""
    found = WORD.findall(file.relative_to(top).with_suffix("").as_posix().lower())
    return found[-1] if found else None


def split_folder(top: Path, validation_split: str, split: str) -> tuple[Path, list[Path], list[str]]:
    """Return the folder of a split, the sub-folders to leave out of it, and a note on those that are not named."""
    folders = {path.name: path for path in entries(top) if is_folder(path)}
    of_training = [name for name in folders if name.lower() in TRAIN]
    allowed = [name for name in folders if name not in of_training]
    named = folders[one_of(f"base.validation_split (a sub-folder of {top})", validation_split, allowed)]
    if split == "validation":
        return named, [], []
    if len(of_training) == 1:
        rest = [name for name in folders if name not in (of_training[0], validation_split)]
        note = f"trains on the sub-folder {shown(of_training[0])} alone, not on {', '.join(map(shown, rest))}"
        return folders[of_training[0]], [], [note] if rest else []
    others = [path for name, path in folders.items() if name.lower() in HELD_OUT and path != named]
    left = ", ".join(shown(path.name) for path in others)
    return top, [named, *others], [f"not trained on, as it is called like a split to hold out: {left}"] if left else []


def training_folder(top: Path, images: Iterable[Path]) -> tuple[Path, list[Path], list[str]]:
    """Return where to train if no split is named, the folders of other splits, and a note.

    That is the one called so, if all images are in such folders, be it in the only sub-folder. Raises InputError if
    some are in a folder that is usually held out, such as `test`, and others are not: nobody trains on those without
    saying so. A class may be called train.
    """
    folder, images = top, list(images)
    while True:
        begin = len(str(folder)) + 1
        below = {str(path)[begin:].partition("/")[:2] for path in images}  # the first folder, or a file
        firsts = {name for name, slash in below if slash}
        if len(firsts) != 1 or len(below) > 1 or next(iter(firsts)).lower() in (*TRAIN, *HELD_OUT):
            break
        folder = folder / next(iter(firsts))
    words = {name: found[-1] for name in firsts if (found := WORD.findall(name.lower()))}
    train = sorted(name for name, word in words.items() if word in TRAIN)
    held_out = sorted(name for name in firsts if name.lower() in HELD_OUT)
    if len(train) == 1 and len(words) == len(below) and (len(words) > 1 or train[0].lower() in TRAIN):
        chosen, others = folder / train[0], sorted(words.keys() - {train[0]})
        left = f", and not on {', '.join(map(shown, others))}" if others else ""
        way = ": name one in base.validation_split" if others and folder == top else ""
        note = f"trains on the sub-folder {shown(chosen.relative_to(top))} of {shown(top)}{left}{way}"
        return chosen, [folder / name for name in others], [note]
    if len(words) == len(below) and train:  # several to train on, and some to hold out
        held_out = sorted(words.keys() - set(train)) or held_out
    if not held_out:
        return top, [], []
    raise InputError(
        f"base.train_data_dir = {shown(folder)} has images in {', '.join(map(shown, held_out))}, which is what splits "
        f"to hold out are called, beside others; say base.validation_split={shown(held_out[0])} to validate on it, "
        "give a folder of training images alone, or rename it if it is a class"
    )
