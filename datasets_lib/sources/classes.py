"""Classes of a folder's images: their names, and their numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from datasets_lib.checks import one_of
from datasets_lib.errors import InputError
from datasets_lib.foreign import composed, shown

LABEL_DIGITS = 18  # as many always fit into an int64


def class_folders(folder: Path, images: list[Path]) -> tuple[list[str] | None, str | None]:
    """Return each image's first-level sub-folder, if these look like classes, or else why they do not.

    Names that look equal, with accents in another Unicode form or blanks at an end, are equal.
    """
    depth = len(folder.parts)
    strays = [image for image in images if len(image.parts) == depth + 1]
    names = {path.parts[depth] for path in images if len(path.parts) > depth + 1}
    if not names:
        return None, None
    if strays:
        return None, f"no classes from sub-folders: {len(strays)} images, such as {shown(strays[0])}, are in none"
    classes = [class_of(image, folder) for image in images]
    if len(set(classes)) < 2:
        return None, f"no classes from sub-folders: all images are in one, {shown(min(names))}"
    return classes, None


def same_but_for_case(names: Sequence[str]) -> list[str]:
    """Return the names that differ from another one by case alone."""
    counts = Counter(name.casefold() for name in names)
    return [name for name in names if counts[name.casefold()] > 1]


def class_of(image: Path, folder: Path) -> str:
    """Return the class that an image's first-level sub-folder stands for."""
    return composed(image.parts[len(folder.parts)].strip())


def class_names(classes: Sequence[str | int] | None) -> list[str] | None:
    """Return the names in order, numbers by their value; None if the classes are integers already."""
    if classes is None or all(isinstance(item, int) for item in classes):
        return None
    names = {str(item) for item in classes}
    numbered = all(name.isdecimal() and len(name) <= LABEL_DIGITS for name in names)
    return sorted(names, key=lambda name: (int(name), name)) if numbered else sorted(names)


def number_classes(
    classes: Sequence[str | int] | None, label_names: list[str] | None, folder: Path
) -> list[int] | None:
    """Return the number of each image's class."""
    if classes is None:
        return None
    if label_names is None:  # the training set's classes are numbers
        for item in classes:
            if not str(item).isdecimal() or len(str(item)) > LABEL_DIGITS:
                found = shown(repr(item))
                raise InputError(f"the class of an image in {folder} is {found}; those to train on have numbers")
        return [int(item) for item in classes]
    for name in sorted({str(item) for item in classes}):
        one_of(f"the class of an image in {folder}", name, label_names)
    numbers = {name: number for number, name in enumerate(label_names)}
    return [numbers[str(item)] for item in classes]
