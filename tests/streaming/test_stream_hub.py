"""Streams of the hub's files through its own client, against a server of ours that answers as the hub does."""

from __future__ import annotations

import http.server
import json
import re
import threading
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import datasets
import huggingface_hub
import pytest
from run_folders import losses
from shard_files import listed, write_shards
from streams import base_of, number_of, numbers, run_options, stream_of

import datasets_lib
from datasets_lib.streaming.shards import Shard
from train import train
from trainers.engine.config.config import load_config

SIZES = (5, 4, 6)
REVISION = "5" * 40
API, FILES = "/api/datasets/owner/name", "/datasets/owner/name/resolve"


class Hub(http.server.BaseHTTPRequestHandler):
    """The data set owner/name: what is said of it, its listing, and its files in parts.

    `faults` are the codes of the next answers with a file, `log` the parts asked for.
    """

    protocol_version = "HTTP/1.1"
    folder, faults, log = Path(), [], []  # one server at a time

    def do_GET(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        if re.fullmatch(rf"{API}(/revision/\w+)?", path):
            self.answer(json.dumps({"id": "owner/name", "sha": REVISION, "siblings": [], "tags": []}).encode())
        elif found := re.fullmatch(rf"{API}/tree/\w+/?(.*)", path):
            every = parse_qs(parts.query).get("recursive") == ["true"]
            self.answer(json.dumps(self.listing(self.folder / found[1], every)).encode())
        elif found := re.fullmatch(rf"({FILES}/\w+|/store)/(.+)", path):
            self.answer_file(self.folder / found[2], redirected=path.startswith("/store"))
        else:
            self.answer(code=404, X_Error_Code="RepoNotFound")

    do_HEAD = do_POST = do_GET

    def listing(self, folder, every):
        return [
            {"type": "file" if path.is_file() else "directory", "path": path.relative_to(self.folder).as_posix(),
             "oid": "1" * 40, "size": path.stat().st_size if path.is_file() else 0}
            for path in sorted(folder.rglob("*") if every else folder.iterdir())
        ]  # fmt: skip

    def answer_file(self, path, redirected):
        if not path.is_file():
            self.answer(code=404, X_Error_Code="EntryNotFound")
        elif not redirected:  # as to a store of large files
            name = path.relative_to(self.folder).as_posix()
            self.answer(code=302, Location=f"/store/{name}?Signature=c2lnbmVk")
        elif self.faults:
            self.answer(code=self.faults.pop(0))
        else:
            first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups())
            self.log.append((path.name, first, last))
            data = path.read_bytes()
            self.answer(data[first : last + 1], 206, Content_Range=f"bytes {first}-{last}/{len(data)}")

    def answer(self, data=b"", code=200, **headers):
        self.send_response(code)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data if self.command != "HEAD" else b"")

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The folder of owner/name; the client is told of the server as by HF_ENDPOINT, which it reads on import."""
    folder = write_shards(tmp_path / "hub" / "data", "parquet", (*SIZES, 3)).parent
    for number, path in enumerate(sorted(folder.glob("data/*"))):
        path.rename(path.with_name(f"train-{number}.parquet" if number < 3 else "test-0.parquet"))
    for name, value in (("folder", folder), ("faults", []), ("log", [])):
        monkeypatch.setattr(Hub, name, value)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as running:
        threading.Thread(target=running.serve_forever, args=[0.01], daemon=True).start()
        address = f"http://127.0.0.1:{running.server_port}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        monkeypatch.setattr(
            huggingface_hub.constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            address + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", address)
        monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda seconds: None)  # the client's own retries
        yield folder
        running.shutdown()


def urls(tmp_path, *names):
    return listed(tmp_path, *(f"hf://datasets/owner/name/{name}" for name in names))


def test_a_data_set_by_name(hub, tmp_path):
    base = base_of(None, dataset_name="owner/name", validation_split="test", cache_dir=str(tmp_path / "cache"))
    stream, held = datasets_lib.build(base, "train"), datasets_lib.build(base, "validation")
    assert [shard.name for shard in stream.shards] == [f"data/train-{n}.parquet" for n in range(3)]
    assert all(f"owner/name@{REVISION}/data/" in shard.location for shard in stream.shards)  # as it is now
    assert sorted(numbers(stream.open_reader(0, None), sum(SIZES))) == list(range(sum(SIZES)))
    assert [number_of(held.get(index, None)) for index in range(3)] == [15, 16, 17]


def test_urls_in_a_list(hub, tmp_path):
    write_shards(hub / "more", "tar", SIZES)
    stream = stream_of(urls(tmp_path, *(f"more/shard-00{n}.tar" for n in range(3))))
    reader = stream.open_reader(0, None)
    before = numbers(reader, 7)
    position = json.loads(json.dumps(reader.position()))
    after = numbers(stream.open_reader(0, position), 8)
    assert sorted(before + after) == list(range(sum(SIZES)))
    assert stream.shards[0].name == "hf://datasets/owner/name/more/shard-000.tar"


def test_files_are_read_in_parts(hub):
    data = bytes(range(256)) * 40
    (hub / "a.tar").write_bytes(data)
    with Shard("hf://datasets/owner/name/a.tar", "a.tar").open() as file:
        file.seek(-300, 2)
        assert file.read(200) == data[-300:-100]
        assert file.seek(10) == 10
    [(name, first, _)] = Hub.log
    assert (name, first) == ("a.tar", len(data) - 300)


def test_errors_that_pass(hub, tmp_path, capsys):
    """503 is tried again by the hub's client, 403 by the reader."""
    reader = stream_of(urls(tmp_path, "data/train-0.parquet", "data/train-1.parquet")).open_reader(0, None)
    seen = numbers(reader, 3)
    Hub.faults += [503, 403, 403]
    assert sorted(seen + numbers(reader, 6)) == list(range(9))
    assert Hub.faults == []
    assert "WARNING" not in capsys.readouterr().out


def test_errors_that_do_not(hub, tmp_path, capsys):
    """And no message holds the signature of the store that the hub sends its client to."""
    stream = stream_of(urls(tmp_path, "data/train-0.parquet", "data/none.parquet"), shard_retries=1)
    reader = stream.open_reader(0, None)
    assert sorted(numbers(reader, 10)[:5]) == list(range(5))
    missing = "WARNING: hf://datasets/owner/name/data/none.parquet: datasets/owner/name/data/none.parquet: the shard is"
    assert f"{missing} skipped as a whole" in capsys.readouterr().out
    Hub.faults += [403] * 9
    with pytest.raises(ValueError, match="none of the 2 shards .* gave an example") as error:
        numbers(reader, 10)
    out = capsys.readouterr().out + str(error.value)
    assert re.search(r"train-0.parquet: 403 Forbidden: .*: http://[\d.:]+/store/data/train-0.parquet ", out)
    assert "c2lnbmVk" not in out
    with pytest.raises(ValueError, match="the last: .*/none/data/none.parquet: .*repository not found"):
        stream_of(listed(tmp_path, "hf://datasets/owner/none/data/none.parquet"))


def test_a_data_set_that_is_not_there(hub, tmp_path):
    base = base_of(None, dataset_name="owner/none", cache_dir=str(tmp_path / "cache"))
    with pytest.raises((ValueError, FileNotFoundError), match="base.dataset_name=owner/none cannot be loaded"):
        datasets_lib.build(base, "train")


def test_workers_read_from_the_hub(hub, tiny_config, tmp_path, capsys):
    """They are forked from a process that has used the client."""
    options = run_options(None, **{"base.dataset_name": "owner/name", "base.cache_dir": str(tmp_path / "cache")})
    options |= {"base.train_data_dir": None, "base.dataloader_num_workers": 1}
    run = train(load_config(tiny_config("ddpm", "run", **options)))
    assert len(losses(run)) == 6
    assert "WARNING" not in capsys.readouterr().out
