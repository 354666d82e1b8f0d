"""scripts/data/make_emoji.py on fonts of coloured bitmaps that are made here; the autoencoders' configs on small data."""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

import matplotlib
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from fontTools.ttLib import TTFont
from marks import slow
from PIL import Image, ImageDraw
from repository import ROOT
from run_folders import read_metrics

from scripts.data import make_emoji
from train import main

PICTURES = {0x1F600: "red", 0x1F415: "green", 0x1F416: "green", 0x1F1E6: "blue", 0x1F3FB: "yellow", 0x41: "black"}
NUMBERS = ("ascender", "descender", "widthMax", "caretSlopeNumerator", "caretSlopeDenominator", "caretOffset")
NUMBERS += ("minOriginSB", "minAdvanceSB", "maxBeforeBL", "minAfterBL", "pad1", "pad2")


def drawing(color):
    """A disk of 20 pixels on 32 x 32, as PNG."""
    picture = Image.new("RGBA", (32, 32))
    ImageDraw.Draw(picture).ellipse((6, 6, 25, 25), fill=color)
    data = io.BytesIO()
    picture.save(data, "png")
    return data.getvalue().hex()


@pytest.fixture(scope="module")
def font(tmp_path_factory):
    """A font with a coloured disk for each character of PICTURES."""
    folder = tmp_path_factory.mktemp("font")
    names = [f"u{code:X}" for code in PICTURES]
    builder = FontBuilder(109, isTTF=True)
    builder.setupGlyphOrder([".notdef", *names])
    builder.setupCharacterMap(dict(zip(PICTURES, names, strict=True)))
    builder.setupGlyf({name: TTGlyphPen(None).glyph() for name in [".notdef", *names]})
    builder.setupHorizontalMetrics(dict.fromkeys([".notdef", *names], (109, 0)))
    builder.setupHorizontalHeader(ascent=101, descent=-27)
    builder.setupPost()
    builder.setupNameTable({"familyName": "Disks", "styleName": "Regular"})
    builder.setupOS2()
    builder.save(folder / "plain.ttf")
    glyphs = "".join(
        f'<cbdt_bitmap_format_17 name="{name}"><SmallGlyphMetrics><height value="32"/><width value="32"/>'
        '<BearingX value="0"/><BearingY value="30"/><Advance value="32"/></SmallGlyphMetrics>'
        f"<rawimagedata>{drawing(color)}</rawimagedata></cbdt_bitmap_format_17>"
        for name, color in zip(names, PICTURES.values(), strict=True)
    )
    numbers = "".join(f'<{name} value="0"/>' for name in NUMBERS)
    metrics = "".join(f'<sbitLineMetrics direction="{way}">{numbers}</sbitLineMetrics>' for way in ("hori", "vert"))
    sizes = {"colorRef": 0, "startGlyphIndex": 1, "endGlyphIndex": len(names), "ppemX": 32, "ppemY": 32}
    sizes |= {"bitDepth": 32, "flags": 1}
    table = metrics + "".join(f'<{name} value="{value}"/>' for name, value in sizes.items())
    places = "".join(f'<glyphLoc id="{number}" name="{name}"/>' for number, name in enumerate(names, 1))
    (folder / "color.ttx").write_text(
        f'<ttFont><CBDT><header version="3.0"/><strikedata index="0">{glyphs}</strikedata></CBDT>'
        f'<CBLC><header version="3.0"/><strike index="0"><bitmapSizeTable>{table}</bitmapSizeTable>'
        f'<eblc_index_sub_table_1 imageFormat="17" firstGlyphIndex="1" lastGlyphIndex="{len(names)}">{places}'
        "</eblc_index_sub_table_1></strike></CBLC></ttFont>"
    )
    colored = TTFont(folder / "plain.ttf")
    del colored["glyf"], colored["loca"]
    colored.importXML(folder / "color.ttx")
    colored.save(folder / "color.ttf")
    return folder / "color.ttf"


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["make_emoji.py", *map(str, arguments)])
    make_emoji.main()


def test_pictures_of_a_colour_font(font, tmp_path, monkeypatch, capsys):
    """Not of letters, skin tones or single flag letters; what is drawn alike is written once."""
    call(monkeypatch, tmp_path / "out", "--font", font, "--size", 48)
    assert f"2 pictures of color.ttf: {tmp_path / 'out'}" in capsys.readouterr().out
    pictures = {path.name: Image.open(path) for path in (tmp_path / "out").iterdir()}
    assert set(pictures) == {"1f415.png", "1f600.png"}
    for name, color in (("1f600.png", (255, 0, 0)), ("1f415.png", (0, 128, 0))):
        picture = pictures[name]
        assert (picture.size, picture.mode) == ((48, 48), "RGB")
        assert picture.getpixel((24, 24)) == color
        assert picture.getpixel((24, 3)) == color  # as large as fits
        assert picture.getpixel((0, 0)) == picture.getpixel((47, 47)) != color
    assert pictures["1f415.png"].getpixel((0, 0)) != pictures["1f600.png"].getpixel((0, 0))


def test_mistakes(font, tmp_path, monkeypatch):
    def error(*arguments):
        with pytest.raises(SystemExit) as caught:
            call(monkeypatch, *arguments)
        return str(caught.value)

    plain = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    out = tmp_path / "out"
    assert "DejaVuSans.ttf: holds no colour bitmaps (CBDT)" in error(out, "--font", plain)
    assert "README.md: no font" in error(out, "--font", ROOT / "README.md")
    assert "--size 8: must be at least 16" in error(out, "--font", font, "--size", 8)
    assert not out.exists()
    assert f"{tmp_path}: exists; choose a new folder" in error(tmp_path, "--font", font)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "fontconfig knows no Noto Color Emoji; install it, or name a colour font with --font" in error(out)


# --- the autoencoders' configs


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(20):
        picture = Image.new("RGB", (64, 64), (12 * number, 100, 255 - 12 * number))
        ImageDraw.Draw(picture).rectangle((number, number, 40, 50), fill=(255, 10 * number, 0))
        picture.save(folder / f"{number}.png")
    return folder


TINY = ["base.max_train_steps=2", "base.train_batch_size=2", "base.logger=none", "base.dataloader_num_workers=0"]
TINY += ["base.valid_steps=2", "base.checkpointing_steps=2", "base.validation_split=0.2", "base.mixed_precision=null"]
NO_DOWNLOAD = ["vae.perceptual_loss=ms_ssim", "vae.adversarial_start_step=1", "base.resolution=64"]


@pytest.mark.parametrize("name", ["vae_emoji", slow("vae_imagefolder")])
def test_configs_from_scratch_on_a_folder(name, pictures, tmp_path):
    options = [
        f"base.train_data_dir={pictures}",
        f"base.output_dir={tmp_path / 'run'}",
        "vae.model_config=autoencoder_emoji",
    ]
    assert main([f"configs/{name}.yaml", *TINY, *NO_DOWNLOAD, *options]) == 0
    assert read_metrics(tmp_path / "run", prefix="valid")[-1]["valid_ema/psnr"] > 0
    assert "discriminator" in read_metrics(tmp_path / "run", prefix="loss")[-1]


@pytest.mark.slow
def test_the_config_of_digits(tmp_path):
    assert main(["configs/vae_digits.yaml", f"base.output_dir={tmp_path / 'run'}", *TINY]) == 0
    assert read_metrics(tmp_path / "run", prefix="valid")[-1]["valid_ema/psnr"] > 0


def test_the_config_of_a_pretrained_decoder(pictures, tmp_path):
    from diffusers import AutoencoderKL

    levels = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    vae = AutoencoderKL(norm_num_groups=8, block_out_channels=(8,) * 3, **levels)
    vae.save_pretrained(tmp_path / "pretrained")
    options = [f"base.train_data_dir={pictures}", f"base.output_dir={tmp_path / 'run'}"]
    options += [f"vae.pretrained_model_name_or_path={tmp_path / 'pretrained'}", "base.gradient_accumulation_steps=2"]
    assert main(["configs/vae_decoder.yaml", *TINY, *NO_DOWNLOAD, *options]) == 0
    assert AutoencoderKL.from_pretrained(tmp_path / "run").config.scaling_factor == 0.18215
