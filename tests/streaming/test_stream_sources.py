"""Streams of lists, of URLs behind a server of our own, and of hub data sets, here a local folder in their layout."""

from __future__ import annotations

import functools
import http.server
import json
import re
import threading
from pathlib import Path

import pytest
from shard_files import listed, write_shards
from streams import KINDS, base_of, number_of, numbers, run_options, stream_of

import datasets_lib
from datasets_lib.streaming import http_file
from datasets_lib.streaming.shards import Shard
from train import main

SIZES = (5, 4, 6)
SECRET = "user:hidden"


class Files(http.server.SimpleHTTPRequestHandler):
    """A folder's files in parts; `faults` is how many of the next requests fail, `log` what was asked for."""

    faults, parts, log, users = 0, True, [], []  # one server at a time

    def do_GET(self):
        self.log.append((self.path, self.headers.get("Range")))
        self.users.append(self.headers.get("Authorization"))
        if type(self).faults > 0:
            type(self).faults -= 1
            self.send_error(503)
            return
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        first, last = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups()
        part = data[int(first) : int(last) + 1] if self.parts else data
        self.send_response(206 if self.parts else 200)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The address of a server of tmp_path/served."""
    monkeypatch.setattr(Files, "log", [])
    monkeypatch.setattr(Files, "faults", 0)
    (tmp_path / "served").mkdir()
    handler = functools.partial(Files, directory=str(tmp_path / "served"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.mark.parametrize("kind", KINDS)
def test_urls_and_paths_are_one_stream(kind, server, tmp_path):
    write_shards(tmp_path / "served", kind, SIZES)
    (tmp_path / "near").mkdir()
    (tmp_path / "served" / f"shard-002.{kind}").rename(tmp_path / "near" / f"last.{kind}")
    file = listed(tmp_path, *(f"http://{server}/shard-00{n}.{kind}" for n in (0, 1)), f"near/last.{kind}")
    stream = stream_of(file)
    assert sorted(numbers(stream.open_reader(0, None), sum(SIZES))) == list(range(sum(SIZES)))
    reader = stream.open_reader(0, None)
    numbers(reader, 7)
    position = json.loads(json.dumps(reader.position()))
    assert numbers(stream.open_reader(0, position), 8) == numbers(reader, 8)


def test_what_is_behind_a_url_is_read_in_parts(server, tmp_path, monkeypatch):
    monkeypatch.setattr(http_file, "PART_BYTES", 1000)
    data = bytes(range(256)) * 40
    (tmp_path / "served" / "a.tar").write_bytes(data)
    with Shard(f"http://{server}/a.tar", "a.tar").open() as file:
        file.seek(5000)
        assert file.read(1500) == data[5000:6500]
        file.seek(-3, 2)
        assert file.read() == data[-3:]
        assert file.read() == b""
        assert file.seek(0) == 0
        assert file.read(2) == data[:2]
    asked = [tuple(map(int, re.findall(r"\d+", part))) for _, part in Files.log]
    assert max(last - first for first, last in asked) <= 1500
    assert sum(last - first + 1 for first, last in asked) < 6000


def test_a_server_that_fails_for_a_while(server, tmp_path, monkeypatch, capsys):
    write_shards(tmp_path / "served", "tar", SIZES)
    stream = stream_of(listed(tmp_path, *(f"http://{server}/shard-00{n}.tar" for n in range(3))))
    reader = stream.open_reader(0, None)
    seen = numbers(reader, 2)
    monkeypatch.setattr(Files, "faults", 3)
    seen += numbers(reader, sum(SIZES) - 2)
    assert sorted(seen) == list(range(sum(SIZES)))
    assert "WARNING" not in capsys.readouterr().out


def test_credentials_are_in_no_message(server, tmp_path, capsys, tiny_config):
    write_shards(tmp_path / "served", "tar", SIZES)
    url = f"http://{SECRET}@{server}/missing.tar?sig=c2VjcmV0"
    file = listed(tmp_path, f"http://{server}/shard-000.tar", url)
    stream = stream_of(file)
    with Shard(url.replace("missing", "shard-001"), "a.tar").open() as opened:
        assert len(opened.read(600)) == 600
    assert Files.users[-1] == "Basic dXNlcjpoaWRkZW4="
    assert Files.log[-1][0] == "/shard-001.tar?sig=c2VjcmV0"
    assert stream.shards[1].name == f"http://{server}/missing.tar"
    reader = stream.open_reader(0, None)
    numbers(reader, 12)
    out = capsys.readouterr().out
    assert f"WARNING: http://{server}/missing.tar: " in out
    assert not any(secret in out for secret in ("hidden", "c2VjcmV0"))
    again = stream_of(listed(tmp_path, f"http://{server}/shard-000.tar", url.replace("c2Vj", "other")))
    assert again.fingerprint == stream.fingerprint  # a new signature is the same data
    assert main([str(tiny_config(**run_options(listed(tmp_path, url))))]) == 1
    captured = capsys.readouterr()
    assert "none of the first 1 shards of" in captured.err
    assert not any(secret in captured.err + captured.out for secret in ("hidden", "c2VjcmV0"))


def test_a_server_without_parts(server, tmp_path, monkeypatch):
    write_shards(tmp_path / "served", "tar", SIZES)
    monkeypatch.setattr(Files, "parts", False)
    with pytest.raises(ValueError, match="the server does not serve parts of files"):
        stream_of(listed(tmp_path, f"http://{server}/shard-000.tar"))
    monkeypatch.setattr(Files, "parts", True)
    with pytest.raises(ValueError, match="the last: http://.*/none.tar: the server answers 404 Not Found; check"):
        stream_of(listed(tmp_path, f"http://{server}/none.tar"))


LINES = {
    "../a.tar": "lists '../a.tar', which leads out of its folder; give a path below",
    "/a.tar": "lists '/a.tar', which leads out of its folder",
    "ftp://host/a.tar": "the scheme of a URL in .* is 'ftp'; it must be one of: http, https, hf, s3, gs",
    "file:///etc/a.tar": "the scheme of a URL in .* is 'file'; it must be one of",
    "a.zip": "the end of the name a.zip in .* is '.zip'; it must be one of: .parquet, .tar",
    "https://user:word@host/a.bin?x=1": "the end of the name https://host/a.bin in .* is '.bin'",
    "link.tar": "link.tar leads out of .*, as a link or through one; copy it into the folder",
    "gone.tar": "lists 'gone.tar', and there is no such file; correct or remove the line",
    "linked/outside.tar": "linked/outside.tar leads out of",
    "a.tar\n./a.tar": "lists a.tar 2 times; an epoch has each shard once: keep one line",
}  # fmt: skip


@pytest.mark.parametrize("line", LINES)
def test_lines_that_are_no_shards(line, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "outside.tar").touch()
    (tmp_path / "in" / "link.tar").symlink_to(tmp_path / "outside.tar")
    (tmp_path / "in" / "linked").symlink_to(tmp_path)
    (tmp_path / "in" / "a.tar").touch()
    with pytest.raises((ValueError, FileNotFoundError), match=LINES[line]):
        stream_of(listed(tmp_path / "in", line))


def test_lists_that_cannot_be_had(tmp_path):
    (tmp_path / "empty.txt").write_text("# nothing\n")
    with pytest.raises(ValueError, match=r"empty.txt lists no shards; give a URL or a path in each line"):
        stream_of(tmp_path / "empty.txt")
    with pytest.raises(
        ValueError,
        match="base.validation_split is 'held', but base.train_data_dir=.*empty.txt has no named splits; set it",
    ):
        stream_of(tmp_path / "empty.txt", validation_split="held")


# --- hub data sets


@pytest.fixture
def hub(tmp_path):
    """A folder in the layout of a hub data set with two splits."""
    write_shards(tmp_path / "hub" / "data", "parquet", (*SIZES, 3))
    for number in range(3):
        (tmp_path / "hub" / "data" / f"shard-00{number}.parquet").rename(
            tmp_path / "hub" / "data" / f"train-0000{number}-of-00003.parquet"
        )
    (tmp_path / "hub" / "data" / "shard-003.parquet").rename(tmp_path / "hub" / "data" / "test-00000-of-00001.parquet")
    return tmp_path / "hub"


def hub_base(hub, **changed):
    return base_of(None, dataset_name=str(hub), **changed)


def test_a_hub_data_set_is_read_by_its_files(hub):
    base = hub_base(hub, validation_split="test")
    stream, held = datasets_lib.build(base, "train"), datasets_lib.build(base, "validation")
    assert [shard.name for shard in stream.shards] == [f"data/train-0000{n}-of-00003.parquet" for n in range(3)]
    assert sorted(numbers(stream.open_reader(0, None), sum(SIZES))) == list(range(sum(SIZES)))
    assert [number_of(held.get(index, None)) for index in range(len(held))] == [15, 16, 17]


def test_hub_data_sets_that_cannot_be_streamed(tmp_path, hub):
    (tmp_path / "outside.parquet").touch()
    (hub / "data" / "train-00003-of-00004.parquet").symlink_to(tmp_path / "outside.parquet")
    with pytest.raises(ValueError, match="train-00003-of-00004.parquet leads out of"):
        datasets_lib.build(hub_base(hub), "train")
    (hub / "data" / "train-00003-of-00004.parquet").unlink()
    with pytest.raises(ValueError, match="base.validation_split of .* is 'tset'; it must be one of: .*test"):
        datasets_lib.build(hub_base(hub, validation_split="tset"), "validation")
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "train.csv").write_text("a,b\n1,2\n")
    with pytest.raises(
        ValueError, match=r"has files such as train.csv, and base.streaming: true reads .parquet and .tar"
    ):
        datasets_lib.build(hub_base(tmp_path / "csv"), "train")
    (tmp_path / "nothing").mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match=r"nothing cannot be loaded \("):
        datasets_lib.build(hub_base(tmp_path / "nothing"), "train")
