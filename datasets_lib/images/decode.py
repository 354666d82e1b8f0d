"""Image files of every kind to uint8 tensors of one kind."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from datasets_lib.errors import InputError, MissingFileError
from datasets_lib.foreign import check_regular, shown
from datasets_lib.images.buckets import Size, best
from datasets_lib.images.color import convert, profile_transform
from datasets_lib.images.files import PICTURE_BYTES
from datasets_lib.images.formats import FORMATS, formats_of
from datasets_lib.images.transforms import FILTERS, resized, resized_size, to_tensor

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
TEXT_BYTES = 16 << 20  # of a text or colour profile in a PNG, unpacked: print profiles have more than Pillow's 1 MiB
PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = TEXT_BYTES, 4 * TEXT_BYTES

FINER = 2.5  # at 2, pictures differ twice as much from those of all pixels, and few are decoded sooner


class ImageError(InputError):
    """An image that cannot be used: broken, or larger than allowed."""


@dataclass(frozen=True)
class ImageReader:
    """Reads an image and resizes it to just cover the best of `sizes`; nothing is random."""

    sizes: tuple[Size, ...]
    channels: int
    interpolation: str
    background_color: str
    max_image_pixels: int
    convert_to_srgb: bool = True

    def target(self, size: Size) -> Size:
        """Return the size of an example's picture, for an image of this size."""
        return self.sizes[0] if len(self.sizes) == 1 else best(size, self.sizes)

    def read(self, source: Path | bytes | np.ndarray) -> tuple[torch.Tensor, Size]:
        """Return uint8 [C, H, W], and (height, width) of the upright image before it was resized.

        Any fault raises ImageError, without the image's name.
        """
        try:
            with self._open(source) as opened:
                image, size = self._decode(opened)
                cover = resized_size(size, self.target(size))
                transform = profile_transform(image) if self.convert_to_srgb else None
                if transform is not None:
                    if image.mode != "P" and not image.has_transparency_data:
                        image = resized(image, cover, self.interpolation)  # first, so that few pixels are converted
                    image = convert(image, transform)
                image = to_mode(image, MODES[self.channels], self.background_color)
                return to_tensor(resized(image, cover, self.interpolation)), size
        except Exception as error:  # every decoder fails in its own way
            raise ImageError(self._reason(error)) from error

    def _decode(self, image: Image.Image) -> tuple[Image.Image, Size]:
        """Return the upright image, and its (height, width); a JPEG that is made much smaller is resized here.

        libjpeg decodes it at a half, a quarter or an eighth of its size, if the filter still gets FINER times as many
        pixels as are wanted along each side.
        """
        stored, size = image.size, None
        if isinstance(image, JpegImageFile) and self.interpolation != "nearest":  # which takes pixels as they are
            size = header_size(image)
            cover = resized_size(size, self.target(size))
            wanted = cover if size == stored else cover[::-1]  # (width, height) as it is stored, maybe on its side
            _, part = image.draft(None, (round(FINER * wanted[0]), round(FINER * wanted[1]))) or (None, None)
        image.load()
        if size is not None and image.size != stored:
            image = image.resize(wanted, FILTERS[self.interpolation], part)
        ImageOps.exif_transpose(image, in_place=True)
        return image, size or image.size[::-1]

    def size(self, source: Path | bytes | np.ndarray) -> Size:
        """Return (height, width) of the upright image from its header; raise ImageError if that cannot be read."""
        try:
            with self._open(source) as image:
                return header_size(image)
        except Exception as error:
            raise ImageError(self._reason(error)) from error

    def _open(self, source: Path | bytes | np.ndarray) -> Image.Image:
        if isinstance(source, np.ndarray):
            return Image.fromarray(source)
        image = open_image(source)
        # A 10,000 x 1 strip grows when it is resized, so both sizes count.
        size = image.size[::-1]
        for height, width in (size, resized_size(size, self.target(size))):
            if width * height > self.max_image_pixels:
                image.close()
                raise InputError(
                    f"it has {width} x {height} = {width * height} pixels, read or resized; {self._limit()}"
                )
        return image

    def _reason(self, error: Exception) -> str:
        if isinstance(error, UnidentifiedImageError):
            return f"it is empty or in no known image format ({', '.join(FORMATS)})"
        if isinstance(error, Image.DecompressionBombError):
            return f"{error}; {self._limit()}"
        if "MAX_TEXT" in str(error):
            return f"a text or colour profile in it unpacks to more than {TEXT_BYTES:,} bytes; save it without metadata"
        return _text(error)

    def _limit(self) -> str:
        return f"base.max_image_pixels={self.max_image_pixels} is the limit"


def open_image(source: Path | bytes) -> Image.Image:
    """Opens a picture of one of the documented formats; raises OSError for others and for what is no regular file.

    Raises ValueError for bytes of a table or an archive that are too many for a picture.
    """
    if isinstance(source, Path):
        return Image.open(check_regular(source), formats=formats_of(source))
    if len(source) > PICTURE_BYTES:
        raise InputError(f"it has {len(source):,} bytes, and at most {PICTURE_BYTES:,} are read")
    return Image.open(io.BytesIO(source), formats=tuple(FORMATS))


def read_picture(path: Path, mode: str = "RGB", background: str = "white") -> Image.Image:
    """Return a whole image upright, in sRGB, as L or RGB; raise MissingFileError or ImageError with its name."""
    if not path.exists():
        raise MissingFileError(f"{shown(path)}: there is no such picture")
    try:
        with open_image(path) as image:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            transform = profile_transform(image)
            return to_mode(image if transform is None else convert(image, transform), mode, background)
    except Exception as error:  # every decoder fails in its own way
        raise ImageError(f"{shown(path)}: cannot be read as a picture ({_text(error)})") from error


def _text(error: Exception) -> str:
    return shown(error) or type(error).__name__


def header_size(image: Image.Image) -> Size:
    """Return (height, width) of an opened image when it is upright, without decoding it if possible."""
    if image.format == "TIFF":  # Pillow turns these by itself
        return image.size[::-1]
    # Pillow's PNG reader decodes to find an orientation, which may come after the pixels.
    early = isinstance(image, PngImageFile) and not _has_late_text(image)
    exif = Image.Image.getexif(image) if early else image.getexif()
    turned = exif.get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    return image.size if turned else image.size[::-1]


def _has_late_text(image: PngImageFile) -> bool:
    """Whether a PNG has chunks after its pixels that may hold an orientation."""
    file = image.fp
    assert file is not None  # the image was opened just now
    position = file.tell()
    file.seek(8)
    seen: set[bytes] = set()
    while b"IEND" not in seen and len(head := file.read(8)) == 8:
        if b"IDAT" in seen and head[4:] in (b"eXIf", b"iTXt", b"tEXt", b"zTXt"):
            break
        seen.add(head[4:])
        file.seek(int.from_bytes(head[:4], "big") + 4, io.SEEK_CUR)
    else:
        head = b""
    file.seek(position)
    return bool(head)


def to_mode(image: Image.Image, mode: str, background: str) -> Image.Image:
    """Convert to L, RGB or RGBA: deep images scaled by their range, transparency composited unless RGBA keeps it."""
    if image.mode.startswith(("I", "F")):
        image = Image.fromarray(to_uint8(np.asarray(image)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if mode != "RGBA":
            image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image if image.mode == mode else image.convert(mode)


def to_uint8(values: np.ndarray) -> np.ndarray:
    """Scale 16-bit, 32-bit or float values to 0..255.

    Full scale is 65535 for integers; for floats the first of 1, 255 and 65535 that holds every value. Values outside
    of that, negative ones included, are stretched from their minimum to their maximum.
    """
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise InputError("it holds NaN or infinity")
    scales = (1, 255, 65535) if values.dtype.kind == "f" else (65535,)
    low, high = next(((0, scale) for scale in scales if low >= 0 and high <= scale), (low, high))
    wide = values.astype(np.float64)  # in place from here on: each copy of 64 million pixels takes half a GB
    wide -= low
    wide *= 255 / max(high - low, 1e-12)
    return np.rint(wide, out=wide).astype(np.uint8)
