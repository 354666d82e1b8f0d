from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageFile

import datasets_lib
from datasets_lib.images.decode import ImageError, ImageReader
from datasets_lib.images.transforms import resized_size
from trainers.engine.config.config import ConfigError, load_config

SIZE = 64


def reader(channels=3, resolution=SIZE, interpolation="bilinear", background="white", limit=178956970):
    return ImageReader(((resolution, resolution),), channels, interpolation, background, limit)


def saved(image, path, **options):
    image.save(path, **options)
    return path


def gradient(scale):
    return np.linspace(0, scale, SIZE * SIZE).reshape(SIZE, SIZE)


def pixel(image, path, channels=3, background="white", **options):
    """The values of one pixel in the middle of an even image, after reading it from a file."""
    read = reader(channels, background=background).read(saved(image, path, **options))[0]
    assert read.shape == (channels, SIZE, SIZE)
    return read[:, SIZE // 2, SIZE // 2].tolist()


@pytest.mark.parametrize(
    ("values", "name"),
    [
        (np.rint(gradient(65535)).astype(np.uint16), "deep.png"),
        (np.rint(gradient(65535)).astype(np.int32), "deep.tif"),
        (np.rint(gradient(1e6)).astype(np.int32), "stretched.tif"),
        (gradient(1).astype(np.float32), "unit.tif"),
        (gradient(255).astype(np.float32), "bytes.tif"),
        (gradient(65535).astype(np.float32), "words.tif"),
        ((gradient(2) - 1).astype(np.float32), "signed.tif"),
    ],
)
def test_deep_images_keep_their_gradient(tmp_path, values, name):
    pixels = reader().read(saved(Image.fromarray(values), tmp_path / name))[0].numpy()
    expected = np.rint(gradient(255))
    assert np.abs(pixels - expected).max() <= 1
    assert pixels.mean() == pytest.approx(255 / 2, abs=0.5)
    assert pixels.std() == pytest.approx(255 / 12**0.5, abs=0.5)


def test_a_dark_deep_image_stays_dark(tmp_path):
    path = saved(Image.fromarray(np.full((SIZE, SIZE), 257 * 10, dtype=np.uint16)), tmp_path / "dark.png")
    assert reader(1).read(path)[0].unique().tolist() == [10]


def test_a_float_image_with_nan_is_refused(tmp_path):
    path = saved(Image.fromarray(np.full((SIZE, SIZE), np.nan, dtype=np.float32)), tmp_path / "nan.tif")
    with pytest.raises(ImageError, match=r"NaN or infinity"):
        reader().read(path)


def test_transparency_is_composited_on_the_background(tmp_path):
    transparent_red = Image.new("RGBA", (SIZE, SIZE), (255, 0, 0, 0))
    assert pixel(transparent_red, tmp_path / "a.png") == [255, 255, 255]
    assert pixel(transparent_red, tmp_path / "a.png", background="#0000ff") == [0, 0, 255]
    assert pixel(Image.new("RGBA", (SIZE, SIZE), (255, 0, 0, 51)), tmp_path / "b.png", background="black") == [51, 0, 0]
    assert pixel(Image.new("LA", (SIZE, SIZE), (0, 0)), tmp_path / "c.png") == [255, 255, 255]
    assert pixel(Image.new("RGB", (SIZE, SIZE), (9, 9, 9)), tmp_path / "d.png", transparency=(9, 9, 9)) == [255] * 3


def test_a_palette_with_transparency_is_composited(tmp_path):
    image = Image.new("P", (SIZE, SIZE), 1)
    image.putpalette([0, 255, 0, 255, 0, 0])
    assert pixel(image, tmp_path / "opaque.png") == [255, 0, 0]
    assert pixel(image, tmp_path / "clear.png", transparency=1) == [255, 255, 255]


def test_four_channels_keep_alpha(tmp_path):
    assert pixel(Image.new("RGBA", (SIZE, SIZE), (255, 0, 0, 51)), tmp_path / "a.png", 4) == [255, 0, 0, 51]
    assert pixel(Image.new("RGB", (SIZE, SIZE), (255, 0, 0)), tmp_path / "b.png", 4) == [255, 0, 0, 255]


def test_other_modes(tmp_path):
    assert pixel(Image.new("CMYK", (SIZE, SIZE), (0, 255, 255, 0)), tmp_path / "a.tif") == [255, 0, 0]
    assert pixel(Image.new("1", (SIZE, SIZE), 1), tmp_path / "b.png") == [255, 255, 255]
    assert pixel(Image.new("L", (SIZE, SIZE), 7), tmp_path / "c.png") == [7, 7, 7]
    assert pixel(Image.new("RGB", (SIZE, SIZE), (7, 7, 7)), tmp_path / "d.png", 1) == [7]
    assert pixel(Image.new("RGBA", (SIZE, SIZE), (0, 0, 0, 0)), tmp_path / "e.png", 1) == [255]


def test_cmyk_jpeg_becomes_rgb(tmp_path):
    red = pixel(Image.new("CMYK", (SIZE, SIZE), (0, 255, 255, 0)), tmp_path / "a.jpg", quality=95)
    assert np.abs(np.array(red) - [255, 0, 0]).max() <= 4


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("L", (2 * SIZE, SIZE))
    image.paste(255, (0, 0, SIZE, SIZE))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side: turn a quarter clockwise to see it
    pixels = reader(1).read(saved(image, tmp_path / "a.png", exif=exif))[0]
    assert pixels.shape == (1, 2 * SIZE, SIZE)
    assert pixels[0, :SIZE].unique().tolist() == [255]
    assert pixels[0, SIZE:].unique().tolist() == [0]


def test_the_first_frame_of_an_animation_is_read(tmp_path):
    frames = [Image.new("RGB", (SIZE, SIZE), colour) for colour in ("blue", "red")]
    path = saved(frames[0], tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with Image.open(path) as image:
        assert image.n_frames == 2
    assert reader().read(path)[0][:, 0, 0].tolist() == [0, 0, 255]


@pytest.mark.parametrize("name", ["empty.jpg", "text.jpg"])
def test_files_that_are_no_images(tmp_path, name):
    (tmp_path / name).write_text("hello" if name == "text.jpg" else "")
    with pytest.raises(ImageError, match=r"it is empty or in no known image format"):
        reader().read(tmp_path / name)
    with pytest.raises(ImageError, match=r"it is empty or in no known image format"):
        reader().size(tmp_path / name)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_truncated_files(tmp_path, name):
    noise = np.random.default_rng(0).integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)
    path = saved(Image.fromarray(noise), tmp_path / name)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ImageError):
        reader().read(path)


def test_a_missing_file_is_an_image_error(tmp_path):
    with pytest.raises(ImageError, match=r"there is no such file"):
        reader().read(tmp_path / "gone.png")


def png_header(width, height):
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


def test_the_pixel_limit_is_checked_from_the_header():
    # Nothing follows the header, so whoever decodes first reports a truncated file.
    data = png_header(200, 100) + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    with pytest.raises(ImageError, match=r"200 x 100 = 20000 pixels, read or resized; base.max_image_pixels=19999 is"):
        reader(limit=19999).read(data)
    with pytest.raises(ImageError, match=r"1000000\d* pixels.*base.max_image_pixels=178956970 is the limit"):
        reader().read(png_header(100000, 100000) + data[-12:])


def test_the_pixel_limit_holds_for_the_resized_size(tmp_path):
    path = saved(Image.new("L", (1000, 1)), tmp_path / "strip.png")
    with pytest.raises(ImageError, match=r"64000 x 64 = 4096000 pixels"):
        reader(limit=1_000_000).read(path)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("channels=2", "must be one of 1, 3, 4"),
        ("interpolation=bilinar", "must be one of nearest, bilinear, bicubic, lanczos"),
        ("background_color=whit", "must be a colour: a name such as white, or #rrggbb"),
        ("bad_images=drop", "must be one of error, skip"),
        ("max_image_pixels=400000000", r"must be an integer in \[1, 357913940\]"),
        ("max_train_samples=0", "must be an integer of at least 1, or null"),
    ],
)
def test_settings_that_cannot_be_met(setting, message, tiny_config):
    with pytest.raises(ConfigError, match=f"base.{setting.partition('=')[0]} = .*{message}"):
        load_config(tiny_config(), [f"base.{setting}"], datasets_lib.problems)


@pytest.mark.parametrize(
    ("size", "expected"), [((100, 50), (64, 32)), ((50, 100), (32, 64)), ((5, 5), (32, 32)), ((101, 100), (32, 32))]
)
def test_the_short_side_is_resized(size, expected):
    assert resized_size(size, (32, 32)) == expected
    pixels = reader(resolution=32).read(np.zeros((size[1], size[0], 3), dtype=np.uint8))[0]
    assert pixels.shape == (3, expected[1], expected[0])


def test_downscaling_is_antialiased():
    stripes = np.tile(np.array([0, 255], dtype=np.uint8), (256, 128))
    # Every other column is white: without antialiasing the result is all black or all white.
    assert reader(1, resolution=32).read(stripes)[0].float().mean().item() == pytest.approx(127.5, abs=1)
    assert set(reader(1, resolution=32, interpolation="nearest").read(stripes)[0].unique().tolist()) <= {0, 255}


# --- sizes from headers


def late_exif(path, orientation):
    """A PNG whose orientation comes after its pixels."""
    Image.new("RGB", (40, 20)).save(path)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = b"eXIf" + exif.tobytes()[6:]
    chunk = struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))
    content = path.read_bytes()
    path.write_bytes(content[:-12] + chunk + content[-12:])


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif", "late.png"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_header_says_the_size_of_the_upright_picture(tmp_path, name, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    if name == "late.png":
        late_exif(tmp_path / name, orientation)
    else:
        Image.new("RGB", (40, 20)).save(tmp_path / name, exif=exif)
    expected = (20, 40) if orientation < 5 else (40, 20)
    assert reader().size(tmp_path / name) == reader().read(tmp_path / name)[1] == expected


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif", "a.gif", "a.bmp"])
def test_a_size_needs_no_decoding(tmp_path, name, monkeypatch):
    Image.new("RGB", (40, 20)).save(tmp_path / name)
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)
    assert reader().size(tmp_path / name) == (20, 40)


def test_a_size_without_a_header(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ImageError, match="it is empty or in no known image format"):
        reader().size(tmp_path / "a.png")
    with pytest.raises(ImageError, match="base.max_image_pixels=9 is the limit"):
        reader(limit=9).size(saved(Image.new("RGB", (40, 20)), tmp_path / "b.png"))
