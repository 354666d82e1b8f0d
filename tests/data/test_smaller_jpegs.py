"""JPEGs that are made smaller are decoded with fewer pixels; beside the whole decode."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from sklearn.datasets import load_sample_images

from datasets_lib.images.decode import FINER, ImageError, ImageReader
from datasets_lib.images.transforms import FILTERS, resized_size

PHOTOGRAPHS = dict(zip(("temple", "flower"), map(Image.fromarray, load_sample_images().images), strict=True))
LIMIT = 64_000_000


def jpeg(image, kind="jpeg", **options):
    file = io.BytesIO()
    image.save(file, kind, **{"quality": 92, **options})
    return file.getvalue()


def reader(height, width=None, channels=3, interpolation="bilinear"):
    return ImageReader(((height, width or height),), channels, interpolation, "white", LIMIT)


def whole(data, target, interpolation="bilinear"):
    """The picture by a decode of all its pixels: int [H, W, 3]."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    size = resized_size(image.size[::-1], target)[::-1]
    return np.asarray(image.resize(size, FILTERS[interpolation])).astype(int)


def difference(data, target, interpolation="bilinear"):
    """The mean difference in levels, and the sizes that were decoded."""
    found, size = reader(*target, interpolation=interpolation).read(data)
    assert size == ImageOps.exif_transpose(Image.open(io.BytesIO(data))).size[::-1]
    return np.abs(found.permute(1, 2, 0).numpy() - whole(data, target, interpolation)).mean()


@pytest.fixture
def decoded(monkeypatch):
    """The sizes (width, height) at which JPEGs are decoded."""
    sizes, load = [], JpegImageFile.load

    def noting(self):
        sizes.append(self.size)
        return load(self)

    monkeypatch.setattr(JpegImageFile, "load", noting)
    return sizes


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_photographs(name, interpolation, decoded):
    """640 x 427 pixels, all sharp."""
    for options in ({}, {"subsampling": 0}, {"progressive": True}, {"quality": 75}):
        data = jpeg(PHOTOGRAPHS[name], **options)
        for side, width in ((16, 80), (33, 160), (64, 320)):
            decoded.clear()
            found, _ = reader(side, interpolation=interpolation).read(data)
            assert decoded[0][0] == width
            assert difference(data, (side, side), interpolation) < 0.6
            assert found.dtype.itemsize == 1


def test_a_photograph_of_twelve_megapixels(decoded):
    large = PHOTOGRAPHS["temple"].resize((4000, 3000), Image.Resampling.BICUBIC)
    data = jpeg(large)
    found, _ = reader(512).read(data)
    assert set(decoded) == {(2000, 1500)}
    assert found.shape == (3, 512, 683)
    assert difference(data, (512, 512)) < 0.3


@pytest.mark.parametrize("height", [40, 60])
@pytest.mark.parametrize("side", [128, 256, 512])
def test_text(height, side):
    """Black letters on white of these heights in 2,000 x 1,500 pixels: their edges are what differs."""
    image = Image.new("RGB", (2000, 1500), "white")
    line, font = "The quick brown fox jumps over the lazy dog " * 3, ImageFont.load_default(size=height)
    for top in range(0, 1500, height * 4 // 3):
        ImageDraw.Draw(image).text((top % 50, top), line, fill="black", font=font)
    assert difference(jpeg(image), (side, side)) < 1.5


def test_where_little_is_made_smaller_nothing_changes(decoded):
    data = jpeg(PHOTOGRAPHS["temple"])
    for side in (100, 200, 427, 500):
        assert difference(data, (side, side)) == 0
    assert difference(data, (16, 16), "nearest") == 0
    assert set(decoded) == {(640, 427)}


@pytest.mark.parametrize("size", [(1001, 997), (333, 2000), (4001, 301), (17, 4000)])
def test_at_least_as_many_pixels_as_the_filter_needs(size, decoded):
    draw = np.random.default_rng(0)
    coarse = Image.fromarray(draw.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    data = jpeg(coarse.resize(size, Image.Resampling.BICUBIC))
    for target in ((16, 16), (8, 40), (60, 20), (100, 100)):
        decoded.clear()
        found, _ = reader(*target).read(data)
        assert found.shape[1:] == resized_size(size[::-1], target)
        width, height = decoded[0]
        smaller = (width, height) != size
        assert not smaller or (height >= FINER * found.shape[1] - 1 and width >= FINER * found.shape[2] - 1)
        assert difference(data, target) < (0.6 if smaller else 1e-9)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_pictures(orientation, decoded):
    """Of an odd size, so that the last column and row of the smaller decode are of fewer pixels."""
    image = PHOTOGRAPHS["flower"].crop((0, 0, 637, 421))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = jpeg(image, exif=exif)
    assert difference(data, (24, 40)) < 0.6
    assert decoded[0][0] < 637


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_modes(mode, decoded):
    data = jpeg(PHOTOGRAPHS["temple"].convert(mode))
    assert difference(data, (32, 32)) < 0.6
    grey, _ = reader(32, channels=1).read(data)
    assert grey.shape[0] == 1
    assert decoded[0][0] < 640


def test_several_pictures_in_one_file(decoded):
    data = jpeg(PHOTOGRAPHS["temple"], "mpo", save_all=True, append_images=[PHOTOGRAPHS["flower"]])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert difference(data, (32, 32)) < 0.6
    assert decoded[0][0] < 640


def test_a_file_that_was_cut_is_an_error():
    with pytest.raises(ImageError, match="truncated"):
        reader(16).read(jpeg(PHOTOGRAPHS["temple"])[:9000])
