"""Renders a colour font's pictures into a data set: scripts/data/make_emoji.py OUTPUT [--font FILE]

Small drawings in full colour, on backgrounds of different colours: pictures for autoencoders that need no download
except a font such as Noto Color Emoji. Train on them with configs/vae_emoji.yaml.
"""

from __future__ import annotations

import argparse
import colorsys
import hashlib
import itertools
import shutil
import subprocess
from pathlib import Path

from fontTools.ttLib import TTFont, TTLibError
from PIL import Image, ImageDraw, ImageFont
from tqdm.auto import tqdm

from datasets_lib.errors import InputError, MissingFileError
from trainers.inference.command import check_new, command, path_argument

REGIONAL_INDICATORS = range(0x1F1E6, 0x1F200)  # two of them make a flag
SKIN_TONES = range(0x1F3FB, 0x1F400)
MARGIN = 2  # pixels around a picture at least


def find_font() -> Path:
    """The system's Noto Color Emoji through fontconfig; raises FileNotFoundError if it is not installed."""
    found = ""
    if shutil.which("fc-list") is not None:
        command = ["fc-list", "--format", "%{file}\n", "Noto Color Emoji"]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not found:
        raise MissingFileError("fontconfig knows no Noto Color Emoji; install it, or name a colour font with --font")
    return Path(found.splitlines()[0])


def open_font(path: Path) -> tuple[ImageFont.FreeTypeFont, list[str]]:
    """A font of bitmaps at its own size, and the texts that may be pictures: characters, and pairs that are flags.

    Raises ValueError for a font without colour bitmaps.
    """
    try:
        with TTFont(path) as opened:
            characters, colored = opened.getBestCmap(), "CBLC" in opened
            size = opened["CBLC"].strikes[0].bitmapSizeTable.ppemY if colored else 0
    except (TTLibError, OSError) as error:
        raise InputError(f"--font {path}: no font ({error})") from None
    if not colored:
        raise InputError(f"--font {path}: holds no colour bitmaps (CBDT); take one such as NotoColorEmoji.ttf")
    plain = [
        chr(code) for code in sorted(characters) if code > 0xFF and code not in (*REGIONAL_INDICATORS, *SKIN_TONES)
    ]
    letters = [code for code in REGIONAL_INDICATORS if code in characters]
    flags = ["".join(map(chr, pair)) for pair in itertools.product(letters, repeat=2)]
    return ImageFont.truetype(str(path), size), plain + flags


def draw(font: ImageFont.FreeTypeFont, text: str) -> Image.Image | None:
    """The picture alone, transparent around it; None if the font draws none, or two side by side."""
    left, top, right, bottom = map(int, font.getbbox(text))  # whole pixels, which Pillow's stub calls float
    if right <= left or bottom <= top or right - left > 1.5 * (bottom - top):
        return None
    glyph = Image.new("RGBA", (right - left, bottom - top))
    ImageDraw.Draw(glyph).text((-left, -top), text, font=font, embedded_color=True)
    return glyph.crop(glyph.getbbox()) if glyph.getbbox() else None


def on_background(glyph: Image.Image, text: str, size: int) -> Image.Image:
    """The picture in the middle of a square whose colour follows from the text."""
    scale = (size - 2 * MARGIN) / max(glyph.size)
    glyph = glyph.resize([max(1, round(side * scale)) for side in glyph.size], Image.Resampling.LANCZOS)
    hue, saturation, value = (byte / 255 for byte in hashlib.blake2b(text.encode(), digest_size=3).digest())
    color = colorsys.hsv_to_rgb(hue, 0.2 + 0.5 * saturation, 0.5 + 0.5 * value)
    picture = Image.new("RGBA", (size, size), tuple(round(255 * part) for part in color))
    picture.alpha_composite(glyph, ((size - glyph.width) // 2, (size - glyph.height) // 2))
    return picture.convert("RGB")


def make_emoji(output: Path, path: Path, size: int) -> int:
    """Writes a file per picture, named by its code points; returns how many there are.

    What the font draws alike, such as the sign for a missing picture, is written once.
    """
    font, texts = open_font(path)
    output.mkdir(parents=True)
    seen: set[bytes] = set()
    for text in tqdm(texts, desc="pictures"):
        glyph = draw(font, text)
        if glyph is not None and glyph.tobytes() not in seen:
            seen.add(glyph.tobytes())
            name = "-".join(f"{ord(character):x}" for character in text)
            on_background(glyph, text, size).save(output / f"{name}.png")
    return len(list(output.glob("*.png")))


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=path_argument, help="a new folder")
    parser.add_argument(
        "--font", type=path_argument, help="file of a font with colour bitmaps; default: Noto Color Emoji"
    )
    parser.add_argument("--size", type=int, default=64, help="pixels of a side")
    arguments = parser.parse_args()
    if arguments.size < 16:
        raise InputError(f"--size {arguments.size}: must be at least 16")
    check_new(arguments.output)
    font = arguments.font or find_font()
    count = make_emoji(arguments.output, font, arguments.size)
    print(f"{count} pictures of {font.name}: {arguments.output}")


if __name__ == "__main__":
    main()
