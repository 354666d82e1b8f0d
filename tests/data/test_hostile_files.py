"""Folders and lists of pictures from others: formats, links, pipes, sizes, and names with control characters."""

from __future__ import annotations

import io
import json
import os
import re
import struct
import zlib
from pathlib import Path

import pytest
from confined import confined
from image_folders import build, captions, save, values, write
from PIL import Image
from repository import ROOT

from datasets_lib.errors import FileError
from datasets_lib.images.decode import ImageError, read_picture
from datasets_lib.images.files import METADATA_BYTES, TEXT_BYTES
from train import main
from trainers.engine.config.base_options import BaseConfig

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\n(touched) print\nshowpage\n%%EOF\n"


def encoded(kind, size=(16, 16), **options):
    data = io.BytesIO()
    mode = {"XBM": "1", "MSP": "1", "SPIDER": "F"}.get(kind, "RGB")
    Image.new(mode, size, (9, 9, 9) if mode == "RGB" else 1).save(data, kind, **options)
    return data.getvalue()


def sparse(path, size):
    with open(path, "wb") as file:
        file.truncate(size)


def error_of(folder, *read, seconds=20, **options):
    """What is said of a folder whose examples are read in a process with limits."""

    def run():
        dataset = build(folder, **options)
        for index in range(len(dataset)):
            dataset.get(index, None)
        return "fine"

    return confined(run, seconds=seconds)


# --- formats


@pytest.mark.parametrize("kind", ["ICO", "ICNS", "TGA", "PCX", "SGI", "IM", "PDF", "DIB", "XBM", "SPIDER", "MSP"])
@pytest.mark.parametrize("read", [read_picture, lambda path: build(path.parent).get(0, None)])
def test_a_format_that_is_not_documented_is_refused(tmp_path, kind, read):
    (tmp_path / "e.png").write_bytes(encoded(kind, (32, 32)))
    with pytest.raises(ImageError, match=r"e\.png: "):
        read(tmp_path / "e.png")


@pytest.mark.parametrize("read", [read_picture, lambda path: build(path.parent).get(0, None)])
def test_no_interpreter_of_postscript_is_started(tmp_path, monkeypatch, read):
    """A stand-in for it on the path says whether it was started."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "bin" / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "e.png").write_bytes(EPS)
    with pytest.raises(ImageError, match=r"e\.png: "):
        read(tmp_path / "data" / "e.png")
    assert not (tmp_path / "started").exists()


def test_every_picture_is_opened_by_one_function():
    found = [path.name for path in (ROOT / "datasets_lib").rglob("*.py") if "Image.open(" in path.read_text()]
    assert found == ["decode.py"]


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_pictures_that_would_grow(tmp_path):
    """Text of a PNG that unpacks to 100 MB, a GIF of 300 frames, a TIFF of 300 pages, a PNG of 8,100 x 8,100 pixels."""
    plain = encoded("PNG")
    bomb = zlib.compress(bytes(100 << 20), 9)
    (tmp_path / "text.png").write_bytes(plain[:33] + chunk(b"zTXt", b"a\0\0" + bomb) + plain[33:])
    frames = [Image.new("P", (16, 16), number % 256) for number in range(300)]
    frames[0].save(tmp_path / "frames.gif", save_all=True, append_images=frames[1:])
    pages = [Image.new("L", (16, 16), number % 256) for number in range(300)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    Image.new("1", (8100, 8100)).save(tmp_path / "wide.png")
    kinds = {name: (tmp_path / name).read_bytes() for name in ("text.png", "frames.gif", "pages.tif", "wide.png")}
    said = {}
    for name, data in kinds.items():
        (tmp_path / name.partition(".")[0]).mkdir()
        (tmp_path / name.partition(".")[0] / name).write_bytes(data)
        said[name] = error_of(tmp_path / name.partition(".")[0])
    assert "text.png: " in said["text.png"] or said["text.png"] == "fine"
    assert (said["frames.gif"], said["pages.tif"]) == ("fine", "fine")
    assert "8100 x 8100 = 65610000 pixels" in said["wide.png"]
    assert "base.max_image_pixels=64000000 is the limit" in said["wide.png"]


LIES = {
    "gif": b"GIF89a" + struct.pack("<HHBBB", 60_000, 60_000, 0, 0, 0) + b",\0\0\0\0" + struct.pack("<HHB", 60_000, 60_000, 0) + b"\x08\0;",
    "frame": b"GIF89a" + struct.pack("<HHBBB", 16, 16, 0, 0, 0) + b",\0\0\0\0" + struct.pack("<HHB", 60_000, 60_000, 0) + b"\x08\0;",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "tiff": b"II*\0\x08\0\0\0\x03\0\0\x01\x04\0\x01\0\0\0\x60\xea\0\0\x01\x01\x04\0\x01\0\0\0\x60\xea\0\0\x11\x01\x04\0\x01\0\0\0\0\0\0\0\0\0\0\0",
    "bmp": b"BM" + struct.pack("<IIIIiiHHIIiiII", 58, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0) + bytes(4),
    "nothing": b"",
    "zeros": bytes(5000),
}  # fmt: skip


@pytest.mark.parametrize("case", LIES)
def test_files_that_say_they_are_large(tmp_path, case):
    (tmp_path / "a.png").write_bytes(LIES[case])
    found = error_of(tmp_path)
    assert re.match(r"ImageError: cannot use image .*a.png: (it |.*base.max_image_pixels|.*truncated)", found), found


def test_a_class_folder_whose_name_is_no_utf8(tmp_path):
    save(tmp_path / os.fsdecode(b"caf\xe9") / "a.png")
    save(tmp_path / "tea" / "b.png")
    dataset = build(tmp_path)
    assert all(text.isprintable() for text in dataset.notes)


def test_the_default_limit_of_pixels():
    assert BaseConfig(dataset="digits").max_image_pixels <= 64_000_000


# --- links and paths


def test_links_lead_out_of_a_folder_only_if_that_is_allowed(tmp_path):
    for number, name in enumerate(("data/a", "shared/b", "shared/deep/c", "other/d")):
        save(tmp_path / f"{name}.png", number)
    data, shared = tmp_path / "data", str(tmp_path / "shared")
    (data / "folder").symlink_to(shared)
    (data / "picture.png").symlink_to(tmp_path / "shared" / "b.png")
    with pytest.raises(
        ValueError, match=r"leads out of .*data, .* or add the folder that it leads to to base.allow_out"
    ):
        build(data)
    assert sorted(values(build(data, allow_outside=[shared]))) == [0, 1, 1, 2]
    (data / "third.png").symlink_to(tmp_path / "other" / "d.png")
    with pytest.raises(ValueError, match=r"third.png leads out of"):
        build(data, allow_outside=[shared])
    (data / "third.png").unlink()
    (tmp_path / "shared" / "up").symlink_to(data)  # around in circles
    (tmp_path / "shared" / "self").symlink_to(tmp_path / "shared")
    assert set(values(build(data, allow_outside=[shared]))) == {0, 1, 2}


def test_lists_name_pictures_and_masks_outside_only_if_that_is_allowed(tmp_path):
    save(tmp_path / "shared" / "b.png", 7)
    save(tmp_path / "data" / "a.png", 1)
    allowed = {"allow_outside": [str(tmp_path / "shared")]}
    for name in (str(tmp_path / "shared" / "b.png"), "../shared/b.png"):
        write(tmp_path / "data" / "list.jsonl", {"image": name})
        with pytest.raises(ValueError, match="row 1 of .*list.jsonl names '.*b.png', which leads out of the folder"):
            build(tmp_path / "data" / "list.jsonl")
        assert values(build(tmp_path / "data" / "list.jsonl", **allowed)) == [7]
        write(tmp_path / "data" / "list.jsonl", {"image": "a.png", "mask": name})
        with pytest.raises(ValueError, match="row 1 of .*list.jsonl names '.*b.png', which leads out of the folder"):
            build(tmp_path / "data" / "list.jsonl")
        assert len(build(tmp_path / "data" / "list.jsonl", **allowed)) == 1
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "shared" / "b.png")
    write(tmp_path / "data" / "list.jsonl", {"image": "link.png"})
    with pytest.raises(ValueError, match="row 1 of .*list.jsonl: .*link.png leads out of"):
        build(tmp_path / "data" / "list.jsonl")


def test_what_is_allowed_must_be_folders_and_have_an_effect():
    found = [*BaseConfig(dataset="digits", max_train_steps=1, allow_outside=["/shared"]).problems()]
    assert found == [("allow_outside", "has an effect with train_data_dir, dataset_name and class_data_dir only")]
    found = [*BaseConfig(train_data_dir="pictures", max_train_steps=1, allow_outside=[" "]).problems()]
    assert found == [("allow_outside", "must be a list of folders, such as [/shared/pictures]")]
    assert [*BaseConfig(train_data_dir="pictures", max_train_steps=1, allow_outside=["~/shared"]).problems()] == []


def test_what_is_allowed_is_no_change_of_a_resumed_run():
    assert "allow_outside" in BaseConfig.free_on_resume


def test_metadata_above_a_split_that_leads_elsewhere(tmp_path):
    save(tmp_path / "data" / "train" / "a.png")
    save(tmp_path / "data" / "val" / "b.png")
    (tmp_path / "secret").write_text("a password\n")
    (tmp_path / "data" / "metadata.jsonl").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"metadata.jsonl leads out of") as error:
        build(tmp_path / "data", validation_split="val")
    assert "password" not in str(error.value)


def test_folders_nested_more_deeply_than_python_calls(tmp_path, monkeypatch):
    save(tmp_path / "a.png", 1)
    monkeypatch.chdir(tmp_path)
    for _ in range(1100):
        os.mkdir("d")
        os.chdir("d")
    save(Path("b.png"), 2)
    os.chdir(tmp_path)
    assert sorted(confined(lambda: values(build(tmp_path)))) in ([1], [1, 2])  # as far as a path may be long
    while os.path.isdir("d"):  # pytest removes folders by calls, too
        os.chdir("d")
    (Path("b.png")).unlink()
    for _ in range(1100):
        os.chdir("..")
        os.rmdir("d")


def test_a_folder_that_may_not_be_listed_is_named(tmp_path, monkeypatch):
    """Without its pictures a class would be missing."""
    save(tmp_path / "a.png", 1)
    save(tmp_path / "lost" / "b.png", 2)
    original = os.scandir

    def refusing(path):
        if str(path).endswith("lost"):
            raise PermissionError(13, "Permission denied")
        return original(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(FileError, match=r"lost: cannot be read \(Permission denied\); check its permissions"):
        build(tmp_path)
    (tmp_path / "lost").rename(tmp_path / "lost+found")  # which a disk has, for its system alone
    assert values(build(tmp_path)) == [1]


LOOPS = {"a.png": "a.png: cannot be a path", "deep": "deep: cannot be a path", "metadata.jsonl": "cannot be a path"}


@pytest.mark.parametrize("name", LOOPS)
def test_links_in_a_circle(tmp_path, name):
    save(tmp_path / "data" / "b.png")
    (tmp_path / "data" / name).symlink_to(tmp_path / "data" / "other")
    (tmp_path / "data" / "other").symlink_to(tmp_path / "data" / name)
    with pytest.raises(ValueError, match=LOOPS[name]):
        build(tmp_path / "data")
    with pytest.raises(ValueError, match="cannot be a path .*; correct or remove it"):
        build(tmp_path / "data" / name)


NAMES = {
    "\0.png": "row 1 of .*: .*cannot be a path .*null",
    "\ud800.png": "row 1 of .*: .*cannot be a path",
    "x" * 300 + ".png": "row 1 of .*: .*File name too long",
    "a.png/b.png": "row 1 of .*, which is not there",
    "deep": "row 1 of .*: .*deep: is a folder, not a regular file",
    "pipe.png": "row 1 of .*: .*pipe.png: is a named pipe, not a regular file; remove it",
    "/proc/self/environ": "which leads out of the folder",
    "environ.png": "environ.png leads out of",
    "zero.png": "zero.png leads out of",
    "hard.png": None,
}


@pytest.mark.parametrize("name", NAMES)
def test_names_in_a_list(tmp_path, name):
    save(tmp_path / "a.png")
    (tmp_path / "deep").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "environ.png").symlink_to("/proc/self/environ")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    os.link(tmp_path / "a.png", tmp_path / "hard.png")
    (tmp_path / "list.jsonl").write_text(json.dumps({"image": name}))
    if NAMES[name] is None:
        assert len(values(build(tmp_path / "list.jsonl"))) == 1
        return
    with pytest.raises((ValueError, OSError), match=NAMES[name]):
        build(tmp_path / "list.jsonl")


# --- pipes and devices


@pytest.mark.parametrize("name", ["f.png", "a.txt", "metadata.jsonl", "metadata.csv"])
def test_pipes_are_named_at_the_start(tmp_path, name):
    save(tmp_path / "a.png")
    os.mkfifo(tmp_path / name)
    said = confined(lambda: str(len(build(tmp_path))))
    assert said == f"FileError: {tmp_path / name}: is a named pipe, not a regular file; remove it"


def test_a_picture_that_has_become_a_pipe(tmp_path):
    save(tmp_path / "a.png")
    dataset = build(tmp_path)
    (tmp_path / "a.png").unlink()
    os.mkfifo(tmp_path / "a.png")
    for read in (lambda: dataset.get(0, None), lambda: dataset.pictures.content(0), lambda: dataset.pictures.size(0)):
        assert "cannot use image" in (said := confined(read))
        assert "a.png: is a named pipe, not a regular file" in said
    assert "a.png: cannot be read as a picture" in confined(read_picture, tmp_path / "a.png")


def test_pictures_of_a_class_and_a_mask_that_are_pipes(tmp_path):
    save(tmp_path / "data" / "a.png")
    (tmp_path / "class").mkdir()
    os.mkfifo(tmp_path / "class" / "b.png")
    options = {"class_data_dir": str(tmp_path / "class"), "class_caption": "a dog"}
    assert "b.png: is a named pipe" in confined(lambda: str(len(build(tmp_path / "data", **options))))
    os.mkfifo(tmp_path / "data" / "m.txt")
    write(tmp_path / "data" / "metadata.jsonl", {"file_name": "a.png", "mask": "m.txt"})
    assert "m.txt: is a named pipe" in confined(lambda: str(len(build(tmp_path / "data"))))


# --- sizes


def test_captions_have_a_limit(tmp_path):
    save(tmp_path / "a.png")
    sparse(tmp_path / "a.txt", 20 << 30)
    said = error_of(tmp_path)
    assert said == f"InputError: {tmp_path}/a.txt: has 21,474,836,480 bytes, and at most 1,048,576 are read"
    (tmp_path / "a.txt").write_text("x" * TEXT_BYTES)
    assert len(captions(build(tmp_path))[0]) == TEXT_BYTES
    (tmp_path / "a.txt").unlink()
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png," + "é" * 131_000 + "\n")
    assert len(captions(build(tmp_path))[0]) == 131_000


METADATA = {
    "digits": ('{"file_name": "a.png", "n": ' + "9" * 6000 + "}", "row 1 of .*metadata.jsonl has the line"),
    "nested": ('{"file_name": "a.png", "n": ' + "[" * 100_000, "row 1 of .* not a JSON object that can be read; write"),
    "second": ('{"file_name": "a.png"}\n\n{"n": ' + "[" * 100_000, "row 2 of .* not a JSON object that can be read"),
    "long": ('{"file_name": "a.png", "text": "' + "x" * TEXT_BYTES + '"}', "line 1 of .* has more than 1,048,576 char"),
    "many": ('{"file_name": "a.png", "text": [' + '"xxxxxxxxxx",' * 70_000 + '"x"]}', "fine"),
    "half": ('{"file_name": "a.png", "text": "\\ud800"}', "image .*a.png, row 1 of .* has a caption with half of a char"),
    "label": ('{"file_name": "a.png", "label": ' + "9" * 400 + "}", "row 1 of .* has no class"),
    "name": ('{"file_name": {"a": 1}}', "row 1 of .* has no file_name"),
    "number": ("1e999", "row 1 of .* has the line '1e999', which is not a JSON object"),
    "latin": (b'{"file_name": "\xe9.png"}', "metadata.jsonl is not UTF-8 text"),
    "csv": ("file_name,text,vector\na.png,x," + "9" * 1_000_000 + "\n", "fine"),
    "open": ('file_name,text\na.png,"' + "x\n" * 70_000, "metadata.csv cannot be read after line 70001 .unexpected end"),
    "huge": ('file_name,text\na.png,"' + "x\n" * 600_000, "metadata.csv cannot be read after line .* .field larger"),
    "wide": ("file_name,text\na.png,x,y,z\n", r"row 1 of .*metadata.csv .line 2. has 4 fields, and the header 2 .file_n"),
}  # fmt: skip


@pytest.mark.parametrize("case", METADATA)
def test_metadata_that_cannot_be_read(tmp_path, case):
    text, message = METADATA[case]
    save(tmp_path / "a.png")
    is_csv = isinstance(text, str) and text.startswith("file_name")
    path = tmp_path / ("metadata.csv" if is_csv else "metadata.jsonl")
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    options = {"label_column": "label"} if case == "label" else {}
    said = error_of(tmp_path, **options)
    assert re.search(message, said), said
    assert len(said) < 2000


def test_a_list_of_20_gb(tmp_path):
    save(tmp_path / "a.png")
    sparse(tmp_path / "list.jsonl", 20 << 30)
    said = error_of(tmp_path / "list.jsonl")
    assert (
        said == f"InputError: {tmp_path}/list.jsonl: has 21,474,836,480 bytes, and at most {METADATA_BYTES:,} are read"
    )


def test_classes_with_thousands_of_digits_are_names(tmp_path):
    save(tmp_path / "a.png")
    save(tmp_path / "b.png")
    rows = [{"file_name": "a.png", "label": "9" * 5000}, {"file_name": "b.png", "label": "2"}]
    write(tmp_path / "metadata.jsonl", *rows)
    assert build(tmp_path).label_names == ["2", "9" * 5000]


# --- what a run says

RUNS = {
    "pipe": (lambda folder: os.mkfifo(folder / "f.png"), {}, "f.png: is a named pipe, not a regular file; remove it"),
    "link": (lambda folder: (folder / "f.png").symlink_to("/etc/hostname"), {}, "f.png leads out of"),
    "circle": (lambda folder: (folder / "f.png").symlink_to("f.png"), {}, "f.png: cannot be a path"),
    "metadata": (lambda folder: (folder / "metadata.jsonl").write_text("[" * 100_000), {}, "row 1 of"),
    "index": (lambda folder: [(folder / "a.tar").touch(), (folder / "index.json").write_text("[]")],
              {"base.streaming": True, "base.max_train_samples": None}, "index.json: written by another version"),
    "url": (lambda folder: (folder / "l.txt").write_text("http://[::1/x.tar"),
            {"base.streaming": True, "base.max_train_samples": None, "base.train_data_dir": "l.txt"}, "has a URL in line 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", RUNS)
def test_a_run_ends_with_a_message(tmp_path, tiny_config, capsys, case):
    change, options, message = RUNS[case]
    folder = tmp_path / "data"
    save(folder / "a.png")
    change(folder)
    given = {"base.dataset": None, "base.train_data_dir": str(folder), **options}
    if "base.train_data_dir" in options:
        given["base.train_data_dir"] = str(folder / options["base.train_data_dir"])
    assert main([str(tiny_config("ddpm", **given))]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


# --- names that would write on the terminal

NAME = "\x1b]0;PWN\x07a\nerror: fake\n\u202e"


def test_names_are_shown_escaped_and_train(tmp_path, inspect):
    for number, folder in enumerate(("one", NAME)):
        save(tmp_path / "data" / folder / f"{NAME}.png", number)
        save(tmp_path / "data" / folder / f"{NAME}2.png", number)
    (tmp_path / "data" / "one" / f"{NAME}3.png").write_bytes(b"")
    dataset = build(tmp_path / "data", bad_images="skip")
    assert dataset.label_names == [NAME, "one"]
    assert len(values(dataset)) == 5
    with pytest.raises(ImageError) as error:
        build(tmp_path / "data").get(len(dataset) - 1, None)
    code, lines, _ = inspect(train_data_dir=str(tmp_path / "data"))
    assert code == 1
    for text in (*dataset.notes, str(error.value), *lines):
        assert text.isprintable(), text
        assert not text.startswith("error: fake")


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / f"{NAME}.txt").write_text(" "),
        lambda folder: (folder / f"{NAME}.txt").write_bytes(b"\xff\xfe\x00"),
        lambda folder: write(folder / "metadata.jsonl", {"file_name": f"{NAME}.png", "text": ""}),
        lambda folder: write(folder / "metadata.jsonl", {"file_name": f"{NAME}x.png"}),
        lambda folder: write(folder / "metadata.jsonl", {"file_name": f"../{NAME}.png"}),
        lambda folder: write(folder / "metadata.jsonl", {"file_name": f"{NAME}.png", "mask": f"{NAME}y.png"}),
        lambda folder: write(folder / "metadata.jsonl", {"file_name": f"{NAME}.png", "mask": "/"}),
        lambda folder: (folder / f"{NAME}x.png").symlink_to("/etc"),
        lambda folder: os.mkfifo(folder / f"{NAME}x.png"),
        lambda folder: (folder / f"{NAME}x.png").symlink_to(folder / f"{NAME}x.png"),
        lambda folder: (folder / "metadata.csv").write_text(f'file_name,text\n"{NAME}x.png",a\n'),
        lambda folder: (folder / "metadata.jsonl").write_text('["\x1b[2J"]'),
    ],
)
def test_every_message_on_a_folder_escapes_its_names(tmp_path, change):
    save(tmp_path / f"{NAME}.png")
    change(tmp_path)
    with pytest.raises((ValueError, OSError)) as error:
        build(tmp_path)
    assert str(error.value).isprintable()


def test_columns_are_shown_escaped(tmp_path):
    save(tmp_path / "a.png")
    write(tmp_path / "metadata.jsonl", {"file_name": "a.png", "\x1b[2J": "x"})
    with pytest.raises(ValueError, match="base.caption_column") as error:
        build(tmp_path, caption_column="y")
    assert str(error.value).isprintable()


def test_a_mask_that_cannot_be_read_is_shown_escaped(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "\x1b[2J.txt").write_bytes(b"")
    write(tmp_path / "metadata.jsonl", {"file_name": "a.png", "mask": "\x1b[2J.txt"})
    with pytest.raises(ImageError) as error:
        build(tmp_path).get(0, None)
    assert str(error.value).isprintable()
