"""Every format that is read, by its pixels, and what is passed over."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from image_folders import build, save, values
from PIL import Image, ImageCms, PngImagePlugin

from datasets_lib.images import formats
from datasets_lib.images.decode import ImageReader, open_image, read_picture
from datasets_lib.images.formats import BY_ENDING, ENCODED_EXTENSIONS, EXTENSIONS, FORMATS
from datasets_lib.report.statistics import scan

READER = ImageReader(((16, 16),), 3, "nearest", "white", 1000)
WRITTEN_BY_PILLOW = [name for name in (*FORMATS, *BY_ENDING) if name not in ("PSD", "SUN")]
LOSSY = {"AVIF": 3, "JPEG": 3, "JPEG2000": 0, "WEBP": 0}  # of 255, at most


def picture(size=(16, 16)):
    """A picture that is neither symmetric nor grey: red grows to the right, green downwards."""
    down, right = np.mgrid[: size[1], : size[0]]
    return np.stack([right * 8 + 9, down * 8 + 70, np.full_like(down, 40)], -1).astype(np.uint8)


def written(path, kind, **options):
    lossless = {
        "WEBP": {"lossless": True},
        "JPEG": {"quality": 100, "subsampling": 0},
        "AVIF": {"quality": 100, "subsampling": "4:4:4"},
    }
    Image.fromarray(picture()).save(path, kind, **lossless.get(kind, {}), **options)
    return path


def psd():
    head = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 16, 16, 8, 3) + struct.pack(">III", 0, 0, 0)
    return head + struct.pack(">H", 0) + picture().transpose(2, 0, 1).tobytes()


def sun():
    return struct.pack(">8I", 0x59A66A95, 16, 16, 24, 16 * 16 * 3, 1, 0, 0) + picture()[..., ::-1].tobytes()


@pytest.mark.parametrize("kind", [*FORMATS, *BY_ENDING])
def test_the_pixels_of_every_format(tmp_path, kind):
    for ending in {**FORMATS, **BY_ENDING}[kind]:
        path = tmp_path / f"a{ending}"
        if kind in ("PSD", "SUN"):
            path.write_bytes(psd() if kind == "PSD" else sun())
        elif ending in (".pbm", ".pgm", ".pfm", ".bw"):  # of one channel
            continue
        else:
            written(path, kind)
        pixels, size = READER.read(path)
        difference = np.abs(pixels.numpy().transpose(1, 2, 0).astype(int) - picture())
        assert (difference.max(), size) <= (LOSSY.get(kind, 0), (16, 16)), (kind, ending)
        assert READER.size(path) == (16, 16)
        if kind in FORMATS:  # from a shard, and under another name
            assert (READER.read(path.read_bytes())[0] == pixels).all()
            assert (READER.read(path.rename(tmp_path / "b.png"))[0] == pixels).all()
        else:
            with pytest.raises(ValueError, match="no known image format"):
                READER.read(path.read_bytes())


@pytest.mark.parametrize(("ending", "mode", "value"), [(".pgm", "L", 90), (".pbm", "1", 255), (".bw", "L", 90)])
def test_grey_formats(tmp_path, ending, mode, value):
    Image.new(mode, (16, 16), value).save(tmp_path / f"a{ending}")
    assert (READER.read(tmp_path / f"a{ending}")[0] == value).all()


def test_a_float_map_is_scaled_by_its_range(tmp_path):
    Image.fromarray(np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)).save(tmp_path / "a.pfm")
    assert READER.read(tmp_path / "a.pfm")[0][0].flatten().tolist() == list(range(256))


def test_a_folder_of_all_formats_is_read_whole(tmp_path):
    for number, kind in enumerate(WRITTEN_BY_PILLOW):
        written(tmp_path / f"{number:02}{ {**FORMATS, **BY_ENDING}[kind][0].upper() }", kind)
    dataset = build(tmp_path)
    assert len(dataset) == len(WRITTEN_BY_PILLOW)
    assert [item.fault for item in scan(dataset.pictures, False)] == [None] * len(dataset)
    assert dataset.notes == []


def test_the_second_picture_of_a_camera_is_not_seen(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.mpo", save_all=True, append_images=[Image.new("RGB", (16, 16))])
    with open_image(tmp_path / "a.mpo") as image:
        assert image.format == "MPO"
    assert READER.read(tmp_path / "a.mpo")[0][0, 0, -1] > 100


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_a_turned_picture_of_every_format_that_has_orientations(tmp_path, kind):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its left side
    Image.fromarray(picture((16, 8))).save(tmp_path / "a.png", kind, exif=exif)
    assert READER.size(tmp_path / "a.png") == (16, 8)
    with_all = ImageReader(((16, 8),), 3, "nearest", "white", 1000)
    pixels, _ = with_all.read(tmp_path / "a.png")
    assert np.abs(pixels.numpy().transpose(1, 2, 0).astype(int) - np.rot90(picture((16, 8)), -1)).max() < 30


# --- what is passed over


@pytest.mark.skipif(formats.HAS_HEIF, reason="the extra heif is installed")
def test_files_that_are_no_pictures_are_counted_by_their_endings(tmp_path):
    save(tmp_path / "a.png", 3)
    for name in ("b.HEIC", "c.heic", "d.mp4", "e.svg", "f", "a.txt", "README.md", "metadata.jsonl.bak"):
        (tmp_path / name).write_text("x")
    dataset = build(tmp_path)
    assert values(dataset) == [3]
    found = "2 .heic (pip install diffloop[heif] reads them), 1 .mp4, 1 .svg, 1 without an ending, 1 .bak"
    assert sorted(dataset.notes[0].partition(": ")[2].split(", ")) == sorted(found.split(", "))
    assert dataset.notes[0].startswith("passed over, as no pictures that are read: 2 .heic")


def test_kinds_beyond_the_first_eight_are_summed_up(tmp_path):
    save(tmp_path / "a.png")
    for number in range(12):
        (tmp_path / f"x.k{number:02}").write_text("x")
    assert build(tmp_path).notes[0].endswith("1 .k07, 4 of other kinds")


def test_heic_is_read_with_its_extra(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    heif.from_pillow(Image.fromarray(picture())).save(tmp_path / "a.heic", quality=-1, chroma=444)
    pixels, size = READER.read(tmp_path / "a.heic")
    assert np.abs(pixels.numpy().transpose(1, 2, 0).astype(int) - picture()).max() < 6
    assert (size, len(build(tmp_path))) == ((16, 16), 1)


def test_heic_is_handed_to_its_library_by_the_ending_alone(tmp_path, monkeypatch):
    """The extra need not be installed here: a stand-in says whether it was asked."""
    asked = []
    monkeypatch.setattr(formats, "HAS_HEIF", True)
    monkeypatch.setattr(formats, "_register_heif", lambda: asked.append(True))
    assert formats.formats_of(tmp_path / "a.HEIC") == (*FORMATS, "HEIF")
    assert asked == [True]
    assert formats.formats_of(tmp_path / "a.png") == tuple(FORMATS)
    assert asked == [True]


def test_what_starts_programs_or_decodes_early_is_in_no_table():
    for ending in (".eps", ".ps", ".wmf", ".emf", ".ico", ".icns", ".pdf", ".svg", ".gbr", ".fli", ".mpeg", ".cur"):
        assert ending not in EXTENSIONS
    assert not set(ENCODED_EXTENSIONS) & {ending for endings in BY_ENDING.values() for ending in endings}


# --- large texts and profiles of PNGs


@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "iCCP", "tEXt"])
def test_a_png_with_3_mb_of_text_or_profile(tmp_path, kind):
    about, options = PngImagePlugin.PngInfo(), {}
    if kind == "iCCP":
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        options["icc_profile"] = profile + bytes(3_000_000)
    elif kind == "iTXt":
        about.add_itxt("a", "x" * 3_000_000, zip=True)
    else:
        about.add_text("a", "x" * 3_000_000, zip=kind == "zTXt")
    Image.fromarray(picture()).save(tmp_path / "a.png", pnginfo=about, **options)
    pixels, _ = READER.read(tmp_path / "a.png")
    assert np.abs(pixels.numpy().transpose(1, 2, 0).astype(int) - picture()).max() <= 1


def test_a_text_that_would_fill_the_memory_is_refused_with_what_to_do(tmp_path):
    about = PngImagePlugin.PngInfo()
    about.add_text("a", "x" * 20_000_000, zip=True)
    Image.fromarray(picture()).save(tmp_path / "a.png", pnginfo=about)
    with pytest.raises(ValueError, match="text or colour profile in it unpacks to more than 16,777,216 bytes; save it"):
        READER.read(tmp_path / "a.png")


def test_one_picture_alone_is_read_in_every_format(tmp_path):
    for kind in WRITTEN_BY_PILLOW:
        path = written(tmp_path / f"a{ {**FORMATS, **BY_ENDING}[kind][0] }", kind)
        assert np.abs(np.asarray(read_picture(path), dtype=int) - picture()).max() <= LOSSY.get(kind, 0)
