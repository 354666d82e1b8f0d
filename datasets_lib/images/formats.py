"""The picture formats that are read: rasters that Pillow decodes by itself, when their pixels are asked for.

Never EPS and WMF, for which it starts programs or draws, nor ICO and ICNS, which it decodes before their size is known.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from pathlib import Path

# known by their first bytes, whatever a file is called; an MPO is opened as a JPEG
FORMATS = {
    "AVIF": (".avif", ".avifs"),
    "BMP": (".bmp", ".dib"),
    "DDS": (".dds",),
    "GIF": (".gif",),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    "PNG": (".png", ".apng"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "PSD": (".psd",),
    "QOI": (".qoi",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
# begin with what many other files begin with, too: read from files with these endings alone
BY_ENDING = {
    "PCX": (".pcx",),
    "SGI": (".sgi", ".rgb", ".rgba", ".bw"),
    "SUN": (".ras",),
    "TGA": (".tga", ".icb", ".vda", ".vst"),
}
HEIF = (".heic", ".heif", ".hif")  # with the extra `heif`
HAS_HEIF = find_spec("pillow_heif") is not None

ENCODED_EXTENSIONS = tuple(ending for endings in FORMATS.values() for ending in endings)  # of files in shards
EXTENSIONS = (
    *ENCODED_EXTENSIONS,
    *(ending for endings in BY_ENDING.values() for ending in endings),
    *(HEIF if HAS_HEIF else ()),
)


def is_picture(name: str) -> bool:
    """Whether a file's name ends as a picture's that is read."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def formats_of(path: Path) -> tuple[str, ...]:
    """Returns Pillow's names of the formats that a file of this name may have."""
    ending = path.suffix.lower()
    if ending in HEIF and HAS_HEIF:
        _register_heif()
        return (*FORMATS, "HEIF")
    return (*FORMATS, *(name for name, endings in BY_ENDING.items() if ending in endings))


@cache
def _register_heif() -> None:
    from pillow_heif import register_heif_opener

    register_heif_opener()
