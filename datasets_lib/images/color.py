"""Converts pictures to sRGB whose colour profile says that their numbers mean other colours, such as Display P3."""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

PROFILE_BYTES = 4 << 20  # of a profile that is read at most: those of printers have up to 3 MB
SPACES = {"L": "GRAY", "RGB": "RGB", "RGBA": "RGB", "CMYK": "CMYK"}  # of the profile that a mode needs
ROUNDING = 1  # levels by which the conversion from one sRGB to another may be off


def profile_transform(image: Image.Image) -> ImageCms.ImageCmsTransform | None:
    """Return what `convert` needs; None for sRGB, for no profile, and for one that is broken or of another mode."""
    profile = image.info.get("icc_profile")
    if not isinstance(profile, bytes) or not 0 < len(profile) <= PROFILE_BYTES:
        return None
    if image.mode == "L" and image.has_transparency_data:  # one grey stands for it, which another would not
        return None
    return _transform(profile, _mode(image))


def convert(image: Image.Image, transform: ImageCms.ImageCmsTransform) -> Image.Image:
    """Return the picture in sRGB, as RGB or RGBA."""
    mode = _mode(image)
    converted = ImageCms.applyTransform(image if image.mode == mode else image.convert(mode), transform)
    assert converted is not None  # it was not asked to work in place
    return converted


def _mode(image: Image.Image) -> str:
    """The mode in which colours are converted: palettes, and a colour that stands for transparency, are resolved."""
    if image.mode in ("P", "RGB") and image.has_transparency_data:
        return "RGBA"
    return "RGB" if image.mode == "P" else image.mode


@lru_cache(maxsize=8)  # the pictures of a camera have the same profile, byte for byte
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    to = "RGBA" if mode == "RGBA" else "RGB"
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if mode not in SPACES or source.profile.xcolor_space.strip() != SPACES[mode]:
            return None
        found, colours = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, to), _colours(mode)
        changed = np.asarray(convert(colours, found)).astype(int) - np.asarray(colours.convert(to))
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return None  # as viewers do: the picture itself is not broken
    return found if np.abs(changed).max() > ROUNDING else None


def _colours(mode: str) -> Image.Image:
    """Colours from all parts of the space, by which a profile is compared with sRGB."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    levels = np.linspace(0, 255, 9).round().astype(np.uint8)
    grid = np.stack(np.meshgrid(*[levels] * len(mode)), -1).reshape(1, -1, len(mode))
    return Image.fromarray(grid, mode) if mode == "CMYK" else Image.fromarray(grid)
