"""Masks as files beside the pictures: a-masklabel.png, or a file of the same name in a folder called mask."""

from __future__ import annotations

from pathlib import Path

from datasets_lib.errors import InputError
from datasets_lib.foreign import shown

ENDING = "-masklabel"
FOLDERS = ("mask", "masks")


def split_masks(images: list[Path]) -> tuple[list[Path], dict[str, Path]]:
    """Return the pictures that are no masks, and the masks by their pictures' paths without the ending."""
    masks: dict[str, Path] = {}
    if any(ENDING in (text := str(path)) or "/mask" in text.lower() for path in images):  # else nothing is one
        stems = {str(path.with_suffix("")) for path in images}
        for path in images:
            if (stem := _picture_of(path)) is not None and stem in stems:
                masks[stem] = path
    taken = set(masks.values())
    return [path for path in images if path not in taken], masks


def _picture_of(mask: Path) -> str | None:
    """The path without ending of the picture that a file would be the mask of, by its name."""
    if mask.stem.endswith(ENDING):
        return str(mask.with_name(mask.stem.removesuffix(ENDING)))
    if mask.parent.name.lower() in FOLDERS:
        return str(mask.parent.parent / mask.stem)
    return None


def masks_of(images: list[Path], masks: dict[str, Path]) -> list[Path]:
    """Return the mask of each picture; raise InputError for one without."""
    found = [masks.get(str(path.with_suffix(""))) for path in images]
    for path, mask in zip(images, found, strict=True):
        if mask is None:
            raise InputError(
                f"base.mask_files = true: {shown(path)} has no mask; add {path.stem}{ENDING}.png or "
                f"mask/{path.stem}.png beside it (a white one changes nothing)"
            )
    return [mask for mask in found if mask is not None]
