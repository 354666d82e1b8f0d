"""Shards, lists and indexes from others: bombs, headers, links, pipes, and names with control characters."""

from __future__ import annotations

import io
import json
import os
import re
import struct
import tarfile
import time
import zlib

import pyarrow
import pyarrow.parquet
import pytest
from confined import confined
from script_calls import run_script
from shard_files import listed, png, tar_members, write_parquet, write_shards, write_tar
from streams import number_of, numbers, stream_of

import datasets_lib
from datasets_lib.images.files import PICTURE_BYTES, TEXT_BYTES
from datasets_lib.sources import parquet_size
from datasets_lib.streaming import parquet_rows, writing
from datasets_lib.streaming.rows import read_rows
from datasets_lib.streaming.shards import Shard
from scripts import inspect_data, shard
from trainers.engine.config.base_options import BaseConfig

NAME = "\x1b]0;PWN\x07a\nerror: fake\n\u202e"


def bomb(path, size, rows, **options):
    """Every row has the same picture, which the file holds once."""
    kept = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * rows, pyarrow.int32()), pyarrow.array([bytes(size)]))
    table = pyarrow.table({"image": kept, "text": ["x"] * rows})
    pyarrow.parquet.write_table(table, path, compression="zstd", store_schema=False, **options)


def read(folder, count=3, **options):
    """What is printed and said of a stream, in a process that may take 1 GB."""

    def run():
        stream = stream_of(folder, image_column="image", shard_retries=0, **options)
        reader = stream.open_reader(0, None)
        return [number_of(reader.next(None)) for _ in range(count)]

    return confined(run)


# --- parquet


@pytest.mark.parametrize(("size", "rows"), [(60_000_000, 20), (1_000_000, 100_000)])
def test_a_picture_that_every_row_names_does_not_fill_the_memory(tmp_path, size, rows):
    bomb(tmp_path / "a.parquet", size, rows)
    assert (tmp_path / "a.parquet").stat().st_size < 20_000
    assert read(tmp_path).startswith("ImageError: cannot use image row 0 of a.parquet: it is empty or in no known")


def test_pictures_that_unpack_to_more_than_a_row_group_may(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_size, "UNPACKED_BYTES", 100 << 20)
    with pyarrow.parquet.ParquetWriter(tmp_path / "a.parquet", pyarrow.schema({"image": pyarrow.binary()}),
                                       compression="zstd", use_dictionary=False) as writer:  # fmt: skip
        writer.write_table(pyarrow.table({"image": pyarrow.array([bytes(4_000_000)] * 30)}))
    assert (tmp_path / "a.parquet").stat().st_size < 1 << 20
    assert "a.parquet: a row group takes 120,0" in read(tmp_path)
    assert "bytes of memory, and may take 104,857,600" in read(tmp_path)


@pytest.mark.parametrize("name", ["image", "my.image"])
def test_the_columns_that_are_read_count(tmp_path, name):
    """Others may take more than a row group may: their bytes are not read."""
    table = pyarrow.table({name: [{"bytes": png(1)}] * 3, "text": ["x"] * 3, "other": [bytes(100_000)] * 3})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", use_dictionary=False)
    group = pyarrow.parquet.read_metadata(tmp_path / "a.parquet").row_group(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet_rows, "PICTURE_BYTES", 1000)
        assert parquet_rows._rows_at_once(group, None) == 1
        assert parquet_rows._rows_at_once(group, [name, "text"]) > 1
        assert parquet_rows._rows_at_once(group, ["other"]) == 1
        patch.setattr(parquet_size, "UNPACKED_BYTES", 100)
        patch.setattr(parquet_size, "UNPACKED_RATIO", 0)
        with pytest.raises(ValueError, match="a row group takes"):
            parquet_rows._rows_at_once(group, [name])


def test_a_cell_has_a_limit(tmp_path):
    bomb(tmp_path / "a.parquet", PICTURE_BYTES + 1, 2)
    assert "a.parquet: row 0 has 67,108,865 bytes in column image, and at most 67,108,864 are read" in read(tmp_path)
    pyarrow.parquet.write_table(
        pyarrow.table({"image": [png(1)], "text": ["x" * (TEXT_BYTES + 1)]}), tmp_path / "a.parquet"
    )
    assert "a.parquet: row 0 has 1,048,577 bytes in column text, and at most 1,048,576 are read" in read(tmp_path)


def varint(number):
    """As thrift writes it."""
    number, found = number << 1, b""
    while number > 127:
        found, number = found + bytes([number & 127 | 128]), number >> 7
    return found + bytes([number])


def test_a_footer_that_understates_what_a_file_holds(tmp_path):
    """It is not believed: few rows are decoded at once, and counted before they are copied."""
    path = tmp_path / "a.parquet"
    bomb(path, 30_000_000, 40)
    size = pyarrow.parquet.read_metadata(path).row_group(0).column(0).total_uncompressed_size
    data = path.read_bytes()
    understated = data.replace(varint(size), varint(1 << 20))
    assert len(understated) == len(data) != data.count(varint(size)) + len(data)
    path.write_bytes(understated)
    assert pyarrow.parquet.read_metadata(path).row_group(0).column(0).total_uncompressed_size == 1 << 20
    assert "a.parquet: its rows from 0 on have 240,000," in read(tmp_path)
    with pytest.raises(ValueError, match="row group 0 would take 1,2.* bytes of memory"):
        parquet_size.check_unpacked(path)


def test_rows_at_once_change_no_row(tmp_path, monkeypatch):
    write_parquet(tmp_path / "a.parquet", range(40), group=15)
    file = Shard(str(tmp_path / "a.parquet"), "a.parquet")
    found = [list(read_rows(file, place)) for place in (0, 3, 17)]
    for limit in (1, 2000):
        monkeypatch.setattr(parquet_rows, "PICTURE_BYTES", limit)
        monkeypatch.setattr(parquet_rows, "TEXT_BYTES", 10_000_000)
        monkeypatch.setattr(parquet_rows, "_check_sizes", lambda values, row: None)
        assert [list(read_rows(file, place)) for place in (0, 3, 17)] == found


# --- tar files


def block(name, size, kind=b"0", data=b""):
    """A member of a tar file with a header of our own."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512)


def shard_with(path, *blocks, first=True):
    """A tar file with these blocks between two good examples."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = io.BytesIO()
    write_tar(path, tar_members(range(2)))
    data = path.read_bytes()
    half = data.index(b"part/0001.png")
    plain.write(data[:half] + b"".join(blocks) + data[half:])
    path.write_bytes(plain.getvalue())


HEADERS = {
    "digits": block("x", 200_002, b"x", b"1" * 200_001 + b"\n"),
    "global": block("x", 200_002, b"g", b"1" * 200_001 + b"\n"),
    "solaris": block("x", 200_002, b"X", b"1" * 200_001 + b"\n"),
    "long name": block("././@LongLink", 6 << 30, b"L", b"x" * 1024),
    "long link": block("././@LongLink", 1 << 20, b"K", b"x" * (1 << 20)),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_takes_python_minutes(tmp_path, case):
    """Python before 3.11.10 and 3.12.6: CVE-2024-6232."""
    shard_with(tmp_path / "a.tar", HEADERS[case])
    began = time.monotonic()
    assert re.search(r"the last: a.tar: a header has [\d,]+ bytes, and may have 16,384", read(tmp_path))

    def rest():
        return [row.name for row in read_rows(Shard(str(tmp_path / "a.tar"), "a.tar"), 0)]

    assert re.fullmatch(
        r"ReadError: a header has [\d,]+ bytes, and may have 16,384", confined(rest).removeprefix("TRACEBACK ")
    )
    assert time.monotonic() - began < 10


def test_names_of_usual_length_in_all_formats(tmp_path):
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / f"{kind}" / "a.tar"
        path.parent.mkdir()
        with tarfile.open(path, "w", format=kind) as archive:
            for number in range(3):
                for end, data in (
                    ("png", png(number)),
                    ("cls", str(number).encode()),
                    ("txt", f"picture {number}".encode()),
                ):
                    info = tarfile.TarInfo("é" * 100 + "/" + "x" * 240 + f"{number}.{end}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
        assert numbers(stream_of(path.parent).open_reader(0, None), 3) == [0, 1, 2]


MEMBERS = {
    "0001.png": PICTURE_BYTES + 1,
    "0001.mask.png": PICTURE_BYTES + 1,
    "0001.txt": TEXT_BYTES + 1,
    "0001.json": 1 << 40,
    "0001.cls": TEXT_BYTES + 1,
    "0001.safetensors": 1 << 33,
}


@pytest.mark.parametrize("name", MEMBERS)
def test_members_have_limits(tmp_path, name):
    shard_with(tmp_path / "a.tar", block(f"part/{name}", MEMBERS[name]) if MEMBERS[name] < 1 << 33 else big(name))

    def rest():
        return [row.name for row in read_rows(Shard(str(tmp_path / "a.tar"), "a.tar"), 0)]

    found = confined(rest)
    assert f"its member part/{name} has {MEMBERS[name]:,} bytes, more than" in found, found


def test_a_sparse_member_has_the_limit_of_what_it_stands_for(tmp_path):
    """A header of GNU's kind for 10 GB of which nothing is there."""
    info = tarfile.TarInfo("part/0001.png")
    info.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[483:495] = b"%011o\0" % (10 << 30 >> 1)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    shard_with(tmp_path / "a.tar", bytes(header))

    def rest():
        return [row.name for row in read_rows(Shard(str(tmp_path / "a.tar"), "a.tar"), 0)]

    found = confined(rest)
    assert "its member part/0001.png has 5,368,709,120 bytes, more than 67,108,864" in found, found


def big(name):
    """A header whose size takes more than eleven octal digits."""
    info = tarfile.TarInfo(f"part/{name}")
    info.size = MEMBERS[name]
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("kind", [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_members_that_are_no_files_are_not_opened(tmp_path, kind):
    info = tarfile.TarInfo("part/0000a.png")
    info.type, info.linkname = kind, "/dev/zero"
    shard_with(tmp_path / "a.tar", info.tobuf())

    def rest():
        return [
            (row.name, row.columns["image"] is None) for row in read_rows(Shard(str(tmp_path / "a.tar"), "a.tar"), 0)
        ]

    assert confined(rest) == [
        ("part/0000 of a.tar", False),
        ("part/0000a of a.tar", True),
        ("part/0001 of a.tar", False),
    ]


def test_members_whose_names_lead_elsewhere_write_nothing(tmp_path):
    members = {"/etc/0.png": png(0), "../../1.png": png(1), "a/../../2.png": png(2), "/dev/zero.png": png(3)}
    members = {key: value for name, data in members.items() for key, value in (
        (name, data), (name.replace(".png", ".txt"), f"picture {data and list(members).index(name)}".encode()),
        (name.replace(".png", ".cls"), str(list(members).index(name)).encode()))}  # fmt: skip
    write_tar(tmp_path / "in" / "a.tar", members)
    assert numbers(stream_of(tmp_path / "in").open_reader(0, None), 4) == [0, 1, 2, 3]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.tar", "in"]


def test_jsons_of_members(tmp_path):
    for text in (
        "[" * 100_000,
        "9" * 6000,
        '{"text": "\\ud800"}',
        '{"label": ' + "9" * 400 + "}",
        "null",
        "[1]",
        '{"a": NaN}',
    ):
        write_tar(tmp_path / "a.tar", {"0.png": png(0), "0.json": text.encode()})
        found = confined(lambda: stream_of(tmp_path).open_reader(0, None).next(None)["caption"])
        assert found == "" or re.match("InputError: 0 of a.tar", found), found


# --- lists, folders and indexes


def test_pipes_and_circles_are_named_at_the_start(tmp_path):
    write_shards(tmp_path / "in", "tar", [2])
    for name in ("b.tar", "c.parquet"):
        os.mkfifo(tmp_path / "in" / name)
        assert f"{name}: is a named pipe, not a regular file; remove it" in read(tmp_path / "in")
        (tmp_path / "in" / name).unlink()
    os.mkfifo(tmp_path / "in" / "index.json")
    assert "index.json: is a named pipe" in read(tmp_path / "in")
    (tmp_path / "in" / "index.json").unlink()
    (tmp_path / "in" / "d.tar").symlink_to(tmp_path / "in" / "d.tar")
    assert "d.tar: cannot be a path" in read(tmp_path / "in")
    (tmp_path / "in" / "d.tar").unlink()
    os.mkfifo(tmp_path / "in" / "e.tar")
    assert "e.tar: is a named pipe" in read(listed(tmp_path / "in", "shard-000.tar", "e.tar"))
    assert "index.json leads out of" in outside_index(tmp_path)


def outside_index(tmp_path):
    (tmp_path / "index.json").write_text("{}")
    (tmp_path / "in" / "e.tar").unlink(missing_ok=True)
    (tmp_path / "in" / "index.json").symlink_to(tmp_path / "index.json")
    return read(listed(tmp_path / "in", "shard-000.tar"))


def test_a_shard_that_has_become_a_pipe(tmp_path):
    write_shards(tmp_path, "tar", [2, 2])
    stream = stream_of(tmp_path, shard_retries=0)
    (tmp_path / "shard-000.tar").unlink()
    os.mkfifo(tmp_path / "shard-000.tar")
    assert sorted(confined(lambda: numbers(stream.open_reader(0, None), 2))) == [2, 3]


def test_shards_elsewhere_are_read_if_that_is_allowed(tmp_path):
    write_shards(tmp_path / "shared", "tar", [2, 2])
    (tmp_path / "in").mkdir()
    allowed = {"allow_outside": [str(tmp_path / "shared")]}
    for line in ("../shared/shard-000.tar", f"{tmp_path}/shared/shard-000.tar"):
        with pytest.raises(ValueError, match="which leads out of its folder; give a path below"):
            stream_of(listed(tmp_path / "in", line))
        assert numbers(stream_of(listed(tmp_path / "in", line), **allowed).open_reader(0, None), 2) == [0, 1]
    (tmp_path / "in" / "link").symlink_to(tmp_path / "shared")
    with pytest.raises(ValueError, match="link leads out of .*base.allow_outside"):
        stream_of(tmp_path / "in")
    assert len(stream_of(tmp_path / "in", **allowed).shards) == 2


LINES = {
    "http://[::1/x.tar": "shards.txt has a URL in line 2 that cannot be read; correct the line",
    "http://user:hidden@[::1/x.tar": "has a URL in line 2 that cannot be read",
    "http://user:hidden@h\u2100st/x.tar": "has a URL in line 2 that cannot be read",
    "a\0.tar": "cannot be a path",
    "x" * 300 + ".tar": "File name too long",
    "a.tar/b.tar": "lists 'a.tar/b.tar', and there is no such file",
    "\x1b[2J.tar": "lists '.x1b.2J.tar', and there is no such file",
    "HTTP://host/a.zip": "the end of the name http://host/a.zip",
    "/proc/self/environ": "which leads out of its folder",
    "x" * (TEXT_BYTES + 1): "line 2 of .* has more than 1,048,576 characters",
    "gopher://host/a.tar": "the scheme of a URL in .* is 'gopher'",
    "file:///etc/a.tar": "the scheme of a URL in .* is 'file'",
    "ftp://host/a.tar": "the scheme of a URL in .* is 'ftp'",
    "local://etc/a.tar": "the scheme of a URL in .* is 'local'",
    "zip://a.tar::http://host/b.tar": "the scheme of a URL in .* is 'zip'",
}  # fmt: skip


@pytest.mark.parametrize("line", LINES)
def test_lines_of_a_list(tmp_path, line):
    (tmp_path / "a.tar").touch()
    with pytest.raises((ValueError, OSError), match=LINES[line]) as error:
        stream_of(listed(tmp_path, line))
    assert "hidden" not in str(error.value)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 3000


def test_a_long_list(tmp_path):
    (tmp_path / "long.txt").write_text("".join(f"https://host/{number}.tar\n" for number in range(20_000)))
    began = time.monotonic()
    with pytest.raises(ValueError, match="lists https://host/7.tar 2 times"):
        stream_of(with_line(tmp_path / "long.txt", "https://host/7.tar"))
    assert time.monotonic() - began < 10
    with (tmp_path / "sparse.txt").open("wb") as file:
        file.truncate(20 << 30)
    assert "sparse.txt: has 21,474,836,480 bytes, and at most" in read(tmp_path / "sparse.txt")


def with_line(path, line):
    path.write_text(path.read_text() + line)
    return path


RECORD = {"file": "shard-000.tar", "bytes": 1, "examples": 1}
INDEXES = {
    "[]": "index.json: written by another version",
    "{": "index.json: cannot be read as JSON",
    "[" * 100_000: "index.json: cannot be read as JSON",
    '{"format": ' + "9" * 5000 + "}": "index.json: cannot be read as JSON",
    '{"format": [1]}': "written by another version",
    **{
        json.dumps({"format": 1, **change}): f"index.json: {next(iter(change))} is .*, which cannot be; make the shards again"
        for change in (
            {"shards": 7}, {"shards": {"a": 1}}, {"shards": [7]}, {"shards": [{}]}, {"shards": [RECORD | {"file": 7}]},
            {"shards": [RECORD | {"bytes": "1"}]}, {"shards": [RECORD | {"examples": None}]}, {"shards": [RECORD | {"examples": -1}]},
            {"shards": [RECORD | {"examples": True}]}, {"label_names": 7}, {"label_names": [7]}, {"label_names": "ab"},
            {"highest_label": "7"}, {"highest_label": -1}, {"highest_label": 1e300}, {"encoded_by": 7}, {"examples": []},
            {"label_names": ["\x1b[2J", 3]}, {"resolution": "x"}, {"channels": [3]},
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("text", INDEXES)
def test_an_index(tmp_path, text):
    write_shards(tmp_path, "tar", [2])
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(ValueError, match=INDEXES[text]) as error:
        stream_of(tmp_path)
    assert str(error.value).isprintable()


def test_an_index_of_20_gb(tmp_path):
    write_shards(tmp_path, "tar", [2])
    with (tmp_path / "index.json").open("wb") as file:
        file.truncate(20 << 30)
    assert "index.json: has 21,474,836,480 bytes, and at most" in read(tmp_path)


# --- names that would write on the terminal


def test_names_of_shards_members_and_columns_are_shown_escaped_and_train(tmp_path, capsys):
    members = {f"{NAME}.png": png(0), f"{NAME}.txt": b"picture 0", f"{NAME}.cls": b"0"}
    write_tar(tmp_path / f"{NAME}.tar", {**members, f"{NAME}1.png": b"", f"{NAME}1.txt": b"x", f"{NAME}1.cls": b"0"})
    stream = stream_of(tmp_path, shard_retries=0, bad_images="skip")
    reader = stream.open_reader(0, None)
    assert [number_of(reader.next(None)) for _ in range(3)] == [0, 0, 0]
    write_tar(tmp_path / f"{NAME}.tar", {**members, f"{NAME}.jpg": png(0)})
    assert "TRACEBACK" not in str(confined(lambda: stream.open_reader(0, None).next(None)))
    with pytest.raises(ValueError, match="gave an example") as error:
        stream.open_reader(0, None).next(None)
    printed = [*capsys.readouterr().out.splitlines(), str(error.value)]
    assert any("WARNING" in line for line in printed)
    for line in printed:
        assert line.isprintable()
        assert not line.startswith("error: fake")


def test_an_inspected_stream_is_shown_escaped(tmp_path, capsys):
    write_tar(tmp_path / "in" / f"{NAME}.tar", tar_members(range(3)))
    table = pyarrow.table({f"{NAME}": [1], "image": [png(1)], "text": ["x"]})
    (tmp_path / "in" / "held").mkdir()
    pyarrow.parquet.write_table(table, tmp_path / "in" / "held" / f"{NAME}.parquet")
    base = {"train_data_dir": str(tmp_path / "in"), "streaming": True, "channels": 1, "max_train_steps": 1,
            "validation_split": "held", "image_column": "image"}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({"base": base, "ddpm": {}}))
    run_script(inspect_data, tmp_path / "config.json", "--output", tmp_path / "sheet.png")
    assert all(line.isprintable() for line in capsys.readouterr().out.splitlines())


# --- what scripts/shard.py reads and writes


def test_shards_hold_no_picture_that_a_stream_would_refuse(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "PICTURE_BYTES", 60)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(png(1))
    with pytest.raises(SystemExit, match=r"a.png: has \d+ bytes, and at most 60 are read"):
        run_script(shard, tmp_path / "in", "--output-dir", tmp_path / "out")
    write_parquet(tmp_path / "hub.parquet", range(2))
    dataset = datasets_lib.build(BaseConfig(dataset_name=str(hub(tmp_path)), channels=1), "train")
    with pytest.raises(ValueError, match=r"row 0 of .*: has \d+ bytes, and a shard's picture at most 60"):
        writing.example_of(dataset, 0)


def hub(tmp_path):
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub.parquet").rename(tmp_path / "hub" / "a.parquet")
    return tmp_path / "hub"


def test_a_png_that_is_too_large_to_open_is_put_into_a_shard_as_it_is(tmp_path):
    """Its name ends in png; who reads it says what is wrong with it."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + header
    assert writing._end(data + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + b"\0\0\0\0IDAT5\xafFC") == "png"


@pytest.mark.parametrize("text", ["[]", "7", "{", '{"bytes": "x"}', "[" * 100_000, "pipe"])
def test_a_record_of_a_shard_that_cannot_be_read(tmp_path, text):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(png(1))
    run_script(shard, tmp_path / "in", "--output-dir", tmp_path / "out")
    record = tmp_path / "out" / ".shard-00000.parquet.json"
    before = record.read_text()
    if text == "pipe":
        record.unlink()
        os.mkfifo(record)
        with pytest.raises(SystemExit, match="is a named pipe"):
            run_script(shard, tmp_path / "in", "--output-dir", tmp_path / "out")
        return
    record.write_text(text)
    run_script(shard, tmp_path / "in", "--output-dir", tmp_path / "out")
    assert record.read_text() == before
