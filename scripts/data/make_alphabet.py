"""Renders the letters A to Z from font files into a data set: scripts/data/make_alphabet.py OUTPUT [--fonts FOLDER]

OUTPUT/train and OUTPUT/validation hold a folder per letter, and metadata.csv in each names file, class and font; whole
fonts are held out. Train on it with configs/alphabet.yaml. Fonts that lack a letter are skipped and counted.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import string
import subprocess
from pathlib import Path

from fontTools.ttLib import TTCollection, TTFont, TTLibError
from PIL import Image, ImageDraw, ImageFont
from tqdm.auto import tqdm

from datasets_lib.errors import InputError, MissingFileError
from trainers.engine.run.files import make_folder
from trainers.inference.command import check_new, command, path_argument

SUFFIXES = {".ttf", ".otf", ".ttc", ".otc"}
MARGIN = 2  # pixels around a letter at least
Face = tuple[Path, int]  # a font file and the number of the face in it


def find_fonts(folder: Path | None) -> list[Path]:
    """The font files of a folder, at any depth, or the system's through fontconfig, in a fixed order."""
    if folder is not None:
        if not folder.is_dir():
            raise MissingFileError(f"--fonts {folder}: no such folder")
        found = [path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES]
        if not found:
            raise MissingFileError(f"--fonts {folder}: holds no {', '.join(sorted(SUFFIXES))} file")
        return sorted(found)
    if shutil.which("fc-list") is None:
        raise MissingFileError("fc-list of fontconfig is not installed; name a folder of font files with --fonts")
    listed = subprocess.run(["fc-list", "--format", "%{file}\n"], capture_output=True, text=True, check=True).stdout
    known = {Path(line) for line in listed.splitlines() if Path(line).suffix.lower() in SUFFIXES}
    if not known:
        raise MissingFileError("fontconfig knows no font file; install fonts, or name a folder with --fonts")
    return sorted(known)


def faces_with_letters(path: Path, letters: str) -> tuple[list[Face], int]:
    """The faces of a file that have all letters, and how many lack some; a broken file counts as one of these."""
    try:
        with TTCollection(path) if path.suffix.lower() in (".ttc", ".otc") else TTFont(path, lazy=True) as opened:
            fonts = getattr(opened, "fonts", [opened])
            usable = [all(ord(letter) in (font.getBestCmap() or {}) for letter in letters) for font in fonts]
    except (TTLibError, OSError, AssertionError, KeyError, ValueError):
        return [], 1
    return [(path, number) for number, good in enumerate(usable) if good], usable.count(False)


def render(face: Face, letter: str, size: int) -> Image.Image | None:
    """The letter in black on white, as large as fits, in the middle; None if the font draws nothing."""
    path, number = face
    font = ImageFont.truetype(str(path), 4 * size, index=number)
    left, top, right, bottom = map(int, font.getbbox(letter))  # whole pixels, which Pillow's stub calls float
    if right <= left or bottom <= top:
        return None
    glyph = Image.new("L", (right - left, bottom - top), 255)
    ImageDraw.Draw(glyph).text((-left, -top), letter, fill=0, font=font)
    if min(glyph.tobytes()) > 128:
        return None
    scale = (size - 2 * MARGIN) / max(glyph.size)
    glyph = glyph.resize([max(1, round(side * scale)) for side in glyph.size], Image.Resampling.LANCZOS)
    picture = Image.new("L", (size, size), 255)
    picture.paste(glyph, ((size - glyph.width) // 2, (size - glyph.height) // 2))
    return picture


def make_alphabet(output: Path, fonts: list[Path], size: int, held_out: float) -> dict[str, int]:
    """Writes the data set; returns how many faces were used and skipped, and how many pictures there are.

    Faces whose letters are all drawn alike (a face under two names) count once.
    """
    letters, skipped, sets = string.ascii_uppercase, 0, []
    seen: set[bytes] = set()
    for path in tqdm(fonts, desc="fonts"):
        faces, missing = faces_with_letters(path, letters)
        skipped += missing
        for face in faces:
            try:
                rendered = [render(face, letter, size) for letter in letters]
            except OSError:  # FreeType refuses what fontTools could read
                rendered = []
            pictures = [picture for picture in rendered if picture is not None]
            drawn = b"".join(picture.tobytes() for picture in pictures)
            if len(pictures) < len(letters) or drawn in seen:
                skipped += 1
                continue
            seen.add(drawn)
            sets.append((face, pictures))
    if len(sets) < 2:
        raise InputError(f"{len(sets)} fonts with all of A to Z were found, {skipped} were skipped; two are needed")
    every = max(2, round(1 / held_out))
    splits = {"train": [s for i, s in enumerate(sets) if i % every], "validation": sets[::every]}
    for split, members in splits.items():
        write_split(output / split, members, letters)
    return {"fonts": len(sets), "skipped": skipped} | {k: len(v) * len(letters) for k, v in splits.items()}


def write_split(folder: Path, members: list[tuple[Face, list[Image.Image]]], letters: str) -> None:
    rows, names = [], set()
    for (path, number), pictures in members:
        font = f"{path.stem}-{number}" if number else path.stem
        copies = (name for name in (font, *(f"{font}_{n}" for n in range(2, len(members) + 2))) if name not in names)
        font = next(copies)  # files of one name in two folders are two fonts
        names.add(font)
        for letter, picture in zip(letters, pictures, strict=True):
            name = f"{letter}/{font}.png"
            make_folder(folder / letter)
            picture.save(folder / name)
            rows.append({"file_name": name, "label": letter, "font": font})
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=["file_name", "label", "font"])
        writer.writeheader()
        writer.writerows(rows)


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=path_argument, help="a new folder")
    parser.add_argument(
        "--fonts", type=path_argument, help="folder of font files; default: the system's, through fontconfig"
    )
    parser.add_argument("--size", type=int, default=32, help="pixels")
    parser.add_argument("--held-out", type=float, default=0.1, help="part of the fonts for validation")
    arguments = parser.parse_args()
    check_new(arguments.output)
    if not 0 < arguments.held_out <= 0.5:
        raise InputError(f"--held-out {arguments.held_out}: must be above 0 and at most 0.5")
    found = make_alphabet(arguments.output, find_fonts(arguments.fonts), arguments.size, arguments.held_out)
    print(f"{found['fonts']} fonts, {found['skipped']} skipped (no A to Z, or drawn as another one)")
    print(f"{found['train']} pictures in {arguments.output / 'train'}, {found['validation']} held out")


if __name__ == "__main__":
    main()
