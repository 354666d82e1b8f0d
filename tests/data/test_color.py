"""Pictures with a colour profile show the same colours as sRGB ones."""

from __future__ import annotations

import io

import numpy as np
import pytest
from color_profiles import ADOBE_RGB, DISPLAY_P3, SRGB, decode, numbers_of, profile
from image_sets import image_dataset
from PIL import Image, ImageCms
from sklearn.datasets import load_sample_images

from datasets_lib.images import color
from datasets_lib.images.decode import ImageReader, read_picture

PHOTOGRAPH = load_sample_images().images[0][:400, :600]
READER = ImageReader(((40, 60),), 3, "bilinear", "white", 64_000_000)
AS_IT_IS = ImageReader(((400, 600),), 3, "bilinear", "white", 64_000_000)
P3 = {"icc_profile": profile(DISPLAY_P3)}


def file_of(pixels, kind="png", **options):
    file, image = io.BytesIO(), pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(file, kind, **options)
    return file.getvalue()


def read(reader, pixels, kind="png", **options):
    return reader.read(file_of(pixels, kind, **options))[0].permute(1, 2, 0).numpy().astype(int)


@pytest.mark.parametrize(("primaries", "gamma"), [(DISPLAY_P3, None), (ADOBE_RGB, 2.19921875)], ids=["P3", "Adobe"])
@pytest.mark.parametrize(("reader", "bounds"), [(READER, (0.7, 6)), (AS_IT_IS, (0.5, 3))], ids=["resized", "as it is"])
def test_the_same_picture_in_other_numbers(primaries, gamma, reader, bounds):
    """Beside the closed form; a level of a saturated colour there is up to three here, and the filter is applied there."""
    stored, known = numbers_of(PHOTOGRAPH, primaries, gamma), {"icc_profile": profile(primaries, gamma)}
    assert np.abs(stored.astype(int) - PHOTOGRAPH).mean() > 1.5
    found, wanted = read(reader, stored, **known), read(reader, PHOTOGRAPH)
    assert np.abs(found - wanted).mean() < bounds[0]
    assert np.abs(found - wanted).max() <= bounds[1]


def test_a_photograph_of_a_phone():
    """A JPEG that libjpeg makes smaller, with a profile."""
    large = np.asarray(Image.fromarray(PHOTOGRAPH).resize((2400, 1600), Image.Resampling.BICUBIC))
    found = read(READER, numbers_of(large, DISPLAY_P3), "jpeg", quality=95, **P3)
    assert np.abs(found - read(READER, large, "jpeg", quality=95)).mean() < 1


def test_off_by_an_option():
    stored = numbers_of(PHOTOGRAPH, DISPLAY_P3)
    [on] = [image_dataset([file_of(stored, **P3)], resolution=400)]
    [off] = [image_dataset([file_of(stored, **P3)], resolution=400, convert_to_srgb=False)]
    [plain] = [image_dataset([file_of(stored)], resolution=400)]
    pixels = [each.get(0, None)["image"] for each in (on, off, plain)]
    assert (pixels[1] == pixels[2]).all()
    assert (pixels[0] - pixels[1]).abs().max() > 0.05
    assert on.image_keys(0) != off.image_keys(0)


def test_srgb_profiles_change_nothing():
    for own in (profile(SRGB), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()):
        assert color.profile_transform(Image.open(io.BytesIO(file_of(PHOTOGRAPH, icc_profile=own)))) is None
        assert (read(AS_IT_IS, PHOTOGRAPH, icc_profile=own) == PHOTOGRAPH).all()


@pytest.mark.parametrize("broken", [b"not a profile", profile(DISPLAY_P3)[:200], profile(DISPLAY_P3, space=b"CMYK"), profile(SRGB, 1.8, b"GRAY"), P3["icc_profile"] + bytes(5 << 20)], ids=["text", "cut", "CMYK", "grey", "large"])  # fmt: skip
def test_a_profile_that_cannot_be_used_is_left_out(broken):
    assert (read(AS_IT_IS, PHOTOGRAPH, "tiff", icc_profile=broken) == PHOTOGRAPH).all()


def test_grey_pictures_with_a_curve_of_their_own():
    grey = np.arange(256, dtype=np.uint8)[None].repeat(4, 0)
    found = read(
        ImageReader(((4, 256),), 3, "bilinear", "white", 64_000_000), grey, icc_profile=profile(SRGB, 1.8, b"GRAY")
    )
    light = (grey / 255) ** 1.8
    assert np.abs(decode(found[..., 1] / 255) - light).max() < 0.01
    assert np.abs(found[..., 1] - grey.astype(int)).max() > 10


def test_a_grey_that_stands_for_transparency():
    """Its level would be another one: such a picture is taken as it is."""
    grey = np.full((8, 8), 40, np.uint8)
    grey[4:] = 90
    options = {"transparency": 40, "icc_profile": profile(SRGB, 1.0, b"GRAY")}
    found = read(ImageReader(((8, 8),), 3, "bilinear", "white", 64_000_000), grey, **options)
    assert (found[:4] == 255).all()
    assert (found[4:] == 90).all()


def test_transparency_is_composited_in_srgb():
    red = np.zeros((8, 8, 4), np.uint8)
    red[..., :3], red[:4, :, 3] = numbers_of(np.full((8, 8, 3), (200, 40, 40), np.uint8), DISPLAY_P3), 255
    found = read(ImageReader(((8, 8),), 3, "bilinear", "#0a141e", 64_000_000), red, **P3)
    assert np.abs(found[:4] - (200, 40, 40)).max() <= 2
    assert (found[4:] == (10, 20, 30)).all()
    kept = read(ImageReader(((8, 8),), 4, "bilinear", "white", 64_000_000), red, **P3)
    assert (kept[:4, :, 3] == 255).all()
    assert (kept[4:, :, 3] == 0).all()


@pytest.mark.parametrize("transparent", [False, True])
def test_palettes(transparent):
    pixels = numbers_of(np.full((8, 8, 3), (30, 180, 60), np.uint8), DISPLAY_P3)
    pixels[4:] = 255
    image = Image.fromarray(pixels).quantize(4)
    options = {"transparency": image.getpixel((0, 7))} if transparent else {}
    found = read(ImageReader(((8, 8),), 3, "bilinear", "black", 64_000_000), image, **P3, **options)
    assert np.abs(found[:4] - (30, 180, 60)).max() <= 2
    assert (found[4:] == (0 if transparent else 255)).all()


def test_a_mask_is_no_colour():
    mask = np.arange(256, dtype=np.uint8).reshape(16, 16)
    masks = [file_of(mask, icc_profile=profile(SRGB, 1.8, b"GRAY"))]
    dataset = image_dataset([np.zeros((16, 16, 3), np.uint8)], known={"masks": masks})
    assert np.abs(dataset.get(0, None)["mask"].numpy()[0] * 255 - mask).max() < 0.01


def test_a_picture_that_a_script_is_given(tmp_path):
    (tmp_path / "p3.png").write_bytes(file_of(numbers_of(PHOTOGRAPH, DISPLAY_P3), **P3))
    assert np.abs(np.asarray(read_picture(tmp_path / "p3.png")).astype(int) - PHOTOGRAPH).mean() < 0.5
