"""Masks as files beside the pictures: a-masklabel.png or a-mask.png, or the same name in a folder called mask."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path
from typing import NamedTuple

from datasets_lib.errors import InputError
from datasets_lib.foreign import shown

BESIDE = re.compile(r"(.+)[-_](masklabel|mask|condlabel)", re.IGNORECASE)  # OneTrainer's third is a condition
FOLDERS = ("mask", "masks")


class Beside(NamedTuple):
    """The pictures of a folder, the masks by their pictures, and how many other pictures belong to one."""

    images: list[Path]
    masks: dict[Path, Path]
    others: int


def split_masks(found: list[Path]) -> Beside:
    """Return the pictures that belong to no other one, and the masks."""
    marked = [path for path in found if "mask" in (text := str(path).lower()) or "condlabel" in text]
    if not marked:
        return Beside(found, {}, 0)
    own = {_key(path.parent, path.stem): path for path in found}
    near: dict[str, Path] = {}  # beside the folder of masks, or in another one there
    for path in found:
        for parent in path.parents[:2] if path.parent.name.lower() not in FOLDERS else ():
            near.setdefault(_key(parent, path.stem), path)
    masks: dict[Path, Path] = {}
    taken: set[Path] = set()
    for path in marked:
        match, image = BESIDE.fullmatch(path.stem), None
        if match is not None:
            image = own.get(_key(path.parent, match[1]))
        elif path.parent.name.lower() in FOLDERS:
            image = near.get(_key(path.parent.parent, path.stem))
        if image is None:
            continue
        taken.add(path)
        if match is None or match[2].lower() != "condlabel":
            masks.setdefault(image, path)
    return Beside([path for path in found if path not in taken], masks, len(taken) - len(masks))


def _key(folder: Path, stem: str) -> str:
    return unicodedata.normalize("NFC", f"{folder}/{stem}")


def masks_of(images: list[Path], masks: dict[Path, Path]) -> list[Path]:
    """Return the mask of each picture; raise InputError for one without."""
    for path in images:
        if path not in masks:
            raise InputError(
                f"base.mask_files = true: {shown(path)} has no mask; add {path.stem}-masklabel.png or "
                f"mask/{path.stem}.png beside it (a white one changes nothing)"
            )
    return [masks[path] for path in images]
