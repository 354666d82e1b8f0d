"""Writes scikit-learn's handwritten digits as pictures with captions, in three styles.

scripts/data/make_digits.py OUTPUT

OUTPUT/plain is white ink on black; OUTPUT/paper is blue ink on cream, tilted to the left; OUTPUT/colors has four inks
and papers, these two among them, tilted to either side, for an autoencoder of all styles. Each has the folders train
and validation with metadata.jsonl; a digit held out in one style is held out in all of them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from trainers.inference.command import check_new, command, path_argument

SIZE = 32  # pixels
MARGIN = 3  # pixels, so that turned digits stay whole
HELD_OUT = 0.2  # of the 1,797 digits
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
INKS = (  # and the paper below each
    ((255, 255, 255), (0, 0, 0)),
    ((30, 40, 110), (240, 228, 200)),
    ((250, 225, 120), (30, 90, 70)),
    ((170, 40, 40), (205, 215, 220)),
)
# each draws a tilt in degrees to the left, and the number of an ink
STYLES: dict[str, Callable[[np.random.Generator], tuple[float, int]]] = {
    "plain": lambda random: (0.0, 0),
    "paper": lambda random: (random.normal(25.0, 2.0), 1),
    "colors": lambda random: (random.uniform(-35.0, 35.0), int(random.integers(len(INKS)))),
}


def paint(mask: Image.Image, tilt: float, ink: tuple[int, ...], ground: tuple[int, ...]) -> Image.Image:
    """A picture of the mask, turned by `tilt` degrees: ink where it is 255, ground where it is 0."""
    alpha = np.asarray(mask.rotate(tilt, Image.Resampling.BICUBIC))[..., None] / 255
    return Image.fromarray(np.rint(alpha * ink + (1 - alpha) * ground).astype(np.uint8))


def enlarge(picture: np.ndarray) -> Image.Image:
    """From 8 x 8 values of 0 to 16 to a mask with a margin."""
    side = SIZE - 2 * MARGIN
    small = Image.fromarray(np.rint(picture * 255 / 16).astype(np.uint8))
    mask = Image.new("L", (SIZE, SIZE))
    mask.paste(small.resize((side, side), Image.Resampling.BICUBIC), (MARGIN, MARGIN))
    return mask


def caption(label: int) -> str:
    return f"a handwritten {NAMES[label]}"


def make_digits(output: Path) -> dict[str, int]:
    """Writes all styles; returns how many digits each split has."""
    digits = load_digits()
    masks = [enlarge(picture) for picture in digits.images]
    order = np.random.default_rng(0).permutation(len(masks))
    held_out = round(HELD_OUT * len(masks))
    splits = {"train": np.sort(order[held_out:]), "validation": np.sort(order[:held_out])}
    for style, drawn in STYLES.items():
        random = np.random.default_rng(1)
        for split, numbers in splits.items():
            folder = output / style / split
            folder.mkdir(parents=True)
            rows = []
            for number in numbers:
                label, name = int(digits.target[number]), f"{number:04d}.png"
                tilt, ink = drawn(random)
                paint(masks[number], tilt, *INKS[ink]).save(folder / name)
                rows.append({"file_name": name, "text": caption(label), "label": label})
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / "metadata.jsonl").write_text(lines, encoding="utf-8")
    return {split: len(numbers) for split, numbers in splits.items()}


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=path_argument, help="a new folder")
    output = parser.parse_args().output
    check_new(output)
    found = make_digits(output)
    print(f"{found['train']} digits, {found['validation']} held out, as {', '.join(STYLES)}: {output}")


if __name__ == "__main__":
    main()
