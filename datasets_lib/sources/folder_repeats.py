"""kohya's folders: images in `10_ohwx cat` come ten times an epoch, with the caption `ohwx cat` if they have none."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from datasets_lib.errors import InputError
from datasets_lib.foreign import shown

NUMBERED = re.compile(r"(\d{1,5})_(.*\S.*)")


class Numbered(NamedTuple):
    """The two parts of the name of a picture's folder."""

    repeats: int
    name: str


def numbered_folders(images: list[Path], folder: Path) -> list[Numbered]:
    """Return what the first-level sub-folder of each image says; raise InputError for one without a number."""
    found = []
    for image in images:
        parts = image.relative_to(folder).parts
        match = NUMBERED.fullmatch(parts[0]) if len(parts) > 1 else None
        if match is None or int(match[1]) == 0:
            raise InputError(
                f"base.folder_repeats = true: {shown(image)} is in no sub-folder called like 10_name, with its "
                "repeats; move it into one, or set base.folder_repeats=false"
            )
        found.append(Numbered(int(match[1]), match[2].strip()))
    return found


def proposal(images: list[Path], folder: Path) -> str | None:
    """A line on base.folder_repeats, if all first-level sub-folders are called so."""
    begin = len(str(folder)) + 1
    if not all(NUMBERED.fullmatch(str(path)[begin:].partition("/")[0]) and path.parent != folder for path in images):
        return None
    return (
        f"the sub-folders of {shown(folder)} are called like kohya's 10_name: base.folder_repeats=true repeats their "
        "images that many times, and gives those without a caption the rest of the name"
    )
