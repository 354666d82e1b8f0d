"""Files are hashed again when they have changed, and only then."""

from __future__ import annotations

import hashlib
import json
import os
import pickle

import pytest
from image_folders import save
from repository import tiny

from datasets_lib import file_hashes
from datasets_lib.file_hashes import FILE, FileHashes


@pytest.fixture
def read(monkeypatch):
    """The files that are read to be hashed, but for those of checkpoints; every change counts as long past."""
    found, original = [], file_hashes.sha256

    def noting(path):
        if "checkpoint-" not in str(path):
            found.append(path.name)
        return original(path)

    monkeypatch.setattr(file_hashes, "sha256", noting)
    monkeypatch.setattr(file_hashes, "SETTLED", -60.0)
    return found


def test_a_file_is_read_once(tmp_path, read):
    (tmp_path / "a").write_bytes(b"one")
    for hashes in (FileHashes(tmp_path / "cache"), FileHashes(tmp_path / "cache")):
        for _ in range(2):
            assert hashes.sha256(tmp_path / "a") == hashlib.sha256(b"one").hexdigest()
    assert read == ["a"]
    os.chdir(tmp_path)
    assert pickle.loads(pickle.dumps(hashes)).sha256(file_hashes.Path("a")) == hashlib.sha256(b"one").hexdigest()
    assert read == ["a"]


def test_a_file_that_changed_is_read_again(tmp_path, read):
    path, hashes = tmp_path / "a", FileHashes(tmp_path)
    path.write_bytes(b"one")
    hashes.sha256(path)
    before = path.stat()
    path.write_bytes(b"longer")
    assert hashes.sha256(path) == hashlib.sha256(b"longer").hexdigest()
    path.write_bytes(b"other!")  # as long
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as editors of pictures' metadata can
    assert FileHashes(tmp_path).sha256(path) == hashlib.sha256(b"other!").hexdigest()
    os.utime(path, ns=(1, 2))
    hashes.sha256(path)
    assert read == ["a"] * 4


def test_a_change_a_moment_ago_is_not_remembered(tmp_path, read, monkeypatch):
    monkeypatch.setattr(file_hashes, "SETTLED", 2.0)
    (tmp_path / "a").write_bytes(b"one")
    FileHashes(tmp_path).sha256(tmp_path / "a")
    assert not (tmp_path / FILE).exists()


@pytest.mark.parametrize(
    "line",
    [
        "",
        "{",
        "[]",
        "1",
        '["NAME"]',
        '["NAME", 1, 2, 3, 4]',
        '["NAME", 1, 2, 3, "short"]',
        "[[], 1, 2, 3, 4]",
        "\x00" * 9,
        "[" * 100_000,
        f'["NAME", 1, 2, 3, "{"z" * 64}"]',
    ],
)
def test_lines_that_nobody_wrote_are_left_out(line, tmp_path, read):
    (tmp_path / "a").write_bytes(b"one")
    FileHashes(tmp_path).sha256(tmp_path / "a")
    written = (tmp_path / FILE).read_text()
    (tmp_path / FILE).write_text(written + line.replace("NAME", str(tmp_path / "b")) + "\n" + written[:-20])
    assert FileHashes(tmp_path).known.keys() == {str(tmp_path / "a")}
    assert json.loads(written)[0] == str(tmp_path / "a")


@pytest.mark.parametrize("kind", ["folder", "pipe", "bytes", "no folder"])
def test_without_a_place_the_hashes_are_as_they_should_be(kind, tmp_path, read):
    (tmp_path / "a").write_bytes(b"one")
    place = tmp_path / FILE
    if kind == "folder":
        place.mkdir()
    elif kind == "pipe":
        os.mkfifo(place)
    elif kind == "bytes":
        place.write_bytes(b"\xff\xfe")
    hashes = FileHashes(tmp_path / "a" if kind == "no folder" else tmp_path)
    assert hashes.known == {}
    if kind != "pipe":  # which would wait for somebody to read it
        assert hashes.sha256(tmp_path / "a") == hashlib.sha256(b"one").hexdigest()


@pytest.mark.parametrize("cache", ["disk", "memory"])
def test_a_second_run_reads_no_picture_to_hash_it(cache, tmp_path, run_in_process, read):
    tiny("lora")
    for number in range(6):
        save(tmp_path / "pictures" / f"{number}.png", 40 * number)
    options = {
        "base.dataset": None,
        "base.train_data_dir": str(tmp_path / "pictures"),
        "base.center_crop": True,
        "base.resolution": 16,
    }
    options |= {"lora.cache_latents": cache, "base.max_train_steps": 1, "base.max_train_samples": None}
    run_in_process("a", "lora", **options)
    first = sorted(read)
    assert first[:6] == [f"{number}.png" for number in range(6)]
    assert ("diffusion_pytorch_model.safetensors" in first) == (cache == "disk")
    run_in_process("b", "lora", **options)
    assert sorted(read) == first
    assert (tmp_path / "encoder-cache" / FILE).is_file()
