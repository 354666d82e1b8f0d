"""Masks as files beside the pictures: a-masklabel.png, or the same name in a folder called mask."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from datasets_lib.errors import InputError
from datasets_lib.foreign import composed, shown

SURE = re.compile(r"(.+)-(masklabel|condlabel)", re.IGNORECASE)  # OneTrainer's; the second is a condition
LIKELY = re.compile(r"(.+)[-_.]mask", re.IGNORECASE)  # or a picture of a mask: only if masks are asked for
FOLDERS = ("mask", "masks")
OF_IMAGES = ("image", "images", "img", "imgs", "picture", "pictures", "photos")  # beside a folder of masks


class Beside(NamedTuple):
    """The pictures of a folder, the masks by their pictures, and how many other pictures belong to one."""

    images: list[Path]
    masks: dict[Path, Path]
    others: int


def split_masks(found: list[Path], asked: bool = False) -> Beside:
    """Return the pictures that belong to no other one, and the masks; names such as a_mask.png count if `asked`."""
    marked = [path for path in found if "mask" in (text := str(path).lower()) or "condlabel" in text]
    if not marked:
        return Beside(found, {}, 0)
    own = {_key(path.parent, path.stem): path for path in found}
    near = {
        _key(path.parent.parent, path.stem): path for path in found if path.parent.name.lower() in OF_IMAGES
    } | own  # of a folder of masks
    masks: dict[Path, Path] = {}
    taken: set[Path] = set()
    for path in marked:
        match = SURE.fullmatch(path.stem) or (LIKELY.fullmatch(path.stem) if asked else None)
        image = None if match is None else own.get(_key(path.parent, match[1]))
        if image is None and path.parent.name.lower() in FOLDERS:
            likely = LIKELY.fullmatch(path.stem)
            names = (path.stem, *((likely[1],) if likely else ()))
            image = next((near[key] for name in names if (key := _key(path.parent.parent, name)) in near), None)
        if image is None or image == path:
            continue
        taken.add(path)
        if match is None or not match[0].lower().endswith("condlabel"):
            masks.setdefault(image, path)
    return Beside([path for path in found if path not in taken], masks, len(taken) - len(masks))


def _key(folder: Path, stem: str) -> str:
    return composed(f"{folder}/{stem}")


def masks_of(images: list[Path], masks: dict[Path, Path]) -> list[Path]:
    """Return the mask of each picture; raise InputError for one without."""
    for path in images:
        if path not in masks:
            raise InputError(
                f"base.mask_files = true: {shown(path)} has no mask; add {path.stem}-masklabel.png or "
                f"mask/{path.stem}.png beside it (a white one changes nothing)"
            )
    return [masks[path] for path in images]
