"""Encoder caches that are damaged, or that others have made: a warning and encoded again, or an error with the file."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import tiny_models
import torch
from limited import run_limited
from PIL import Image
from run_folders import losses
from safetensors.torch import load_file, save_file

from train import main
from trainers.engine.encoders import rows_file
from trainers.engine.encoders.cache import Cache, folder_of, text_key
from trainers.engine.encoders.rows_file import CHECKSUMS, checksum, others, write_rows

KEYS = [text_key(text) for text in "abc"]
COLUMNS = ("x", "y")
CPU = torch.device("cpu")


def made(number):
    return [torch.full((2, 3), float(number)), torch.arange(4).half()]


@pytest.fixture
def folder(tmp_path):
    """A cache of three rows, in one file."""
    folder = tmp_path / "cache" / "text-0"
    folder.mkdir(parents=True)
    write_rows(folder, {key: made(number) for number, key in enumerate(KEYS)})
    return folder


def file_of(folder):
    [path] = folder.glob("rows-*.safetensors")
    return path


def rewrite(folder, change, seal=False):
    """Changes the tensors of the file; `seal` writes checksums that fit."""
    path = file_of(folder)
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    change(tensors)
    if seal:
        rows = {}
        for name in sorted(tensors.keys() - {CHECKSUMS}):
            rows.setdefault(name.partition(".")[0], []).append(tensors[name])
        tensors[CHECKSUMS] = torch.tensor([checksum(key, rows[key]) for key in sorted(rows)])
    save_file(tensors, path, metadata={"format": "pt"})


def looked(folder):
    cache = Cache(folder, {"x": (2, None), "y": (4,)})
    return cache, cache.look(KEYS)


def test_good_rows_are_read_and_checked_once(folder, monkeypatch):
    cache, missing = looked(folder)
    assert missing == []
    calls = []
    monkeypatch.setattr(rows_file, "checksum", lambda *arguments: calls.append(1) or checksum(*arguments))
    for _ in range(2):
        found = cache.rows(KEYS, COLUMNS, CPU)
    assert len(calls) == 3
    assert torch.equal(found["x"], torch.stack([made(number)[0] for number in range(3)]))
    assert found["y"].dtype == torch.float16


def set_nan(tensors):
    tensors[f"{KEYS[1]}.0"][0, 0] = float("nan")


def resize(tensors):
    tensors[f"{KEYS[1]}.0"] = torch.ones(3, 3)


def flatten(tensors):
    tensors[f"{KEYS[1]}.0"] = torch.ones(6)


def recolumn(tensors):
    tensors[f"{KEYS[1]}.2"] = torch.ones(1)


def widen(tensors):
    tensors[f"{KEYS[1]}.0"] = torch.ones(2, 4)


def exchange(tensors):
    a, b = f"{KEYS[0]}.0", f"{KEYS[1]}.0"
    tensors[a], tensors[b] = tensors[b], tensors[a]


def flip(tensors):
    tensors[f"{KEYS[1]}.1"].view(torch.int16)[2] ^= 1


@pytest.mark.parametrize(
    ("change", "seal", "message"),
    [
        (flip, False, "is damaged, as its checksum shows"),
        (exchange, False, "is damaged, as its checksum shows"),
        (set_nan, False, "is damaged, as its checksum shows"),
        (set_nan, True, "holds numbers that are not finite: it is damaged, or the encoder overflows in this precision"),
        (resize, True, r"has x \[3, 3\], and the encoder writes \[2, None\]"),
        (flatten, True, r"has x \[6\], and the encoder writes \[2, None\]"),
        (recolumn, True, "has 3 columns, and the encoder writes 2"),
        (widen, True, "has another shape than the rows of its batch"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_row_that_is_not_the_encoders(folder, change, seal, message):
    rewrite(folder, change, seal)
    path = file_of(folder)
    cache, missing = looked(folder)
    assert missing == []
    with pytest.raises(
        OSError, match=rf"{path}: row [0-9a-f]+ {message}; the file is removed, and encoded again at the"
    ):
        cache.rows(KEYS, COLUMNS, CPU)
    assert not path.exists()
    assert looked(folder)[1] == KEYS


def test_rows_of_another_dtype(folder):
    cache = Cache(folder, {}, torch.float32)
    cache.look()
    with pytest.raises(OSError, match="has y in torch.float16, and the encoder writes torch.float32"):
        cache.rows(KEYS, COLUMNS, CPU)


def drop_first(tensors):
    del tensors[f"{KEYS[0]}.0"]


def drop_checksums(tensors):
    del tensors[CHECKSUMS]


def shorten_checksums(tensors):
    tensors[CHECKSUMS] = tensors[CHECKSUMS][:2].clone()


def retype_checksums(tensors):
    tensors[CHECKSUMS] = tensors[CHECKSUMS].float()


def name_badly(tensors):
    tensors["\x1b]0;PWN\x07.7"] = torch.ones(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_first, f"row {KEYS[0]} is not whole"),
        (drop_checksums, "does not contain tensor checksums"),
        (shorten_checksums, "it has no checksum for each row"),
        (retype_checksums, "it has no checksum for each row"),
        (name_badly, r"row \x1b]0;PWN\x07 is not whole"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_file_that_is_not_the_caches(folder, change, message, capsys):
    rewrite(folder, change)
    path = file_of(folder)
    assert looked(folder)[1] == KEYS
    said = capsys.readouterr().out
    assert f"WARNING: {path} cannot be read (" in said
    assert message in said
    assert said.strip().endswith("removed, and encoded again")
    assert said.strip().isprintable()
    assert not path.exists()


def test_a_file_cut_at_any_place(folder, capsys):
    path, content = file_of(folder), file_of(folder).read_bytes()
    for end in range(0, len(content), 37):
        path.write_bytes(content[:end])
        assert looked(folder)[1] == KEYS
        assert not path.exists()
    assert capsys.readouterr().out.count("cannot be read") == len(range(0, len(content), 37))


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def a_folder(path):
    path.unlink()
    path.mkdir()


def link(path):
    path.rename(path.parent.parent / "elsewhere.safetensors")
    path.symlink_to("../elsewhere.safetensors")


def link_to_nothing(path):
    path.unlink()
    path.symlink_to("nothing")


def link_to_a_device(path):
    path.unlink()
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("change", [pipe, a_folder, link, link_to_nothing, link_to_a_device], ids=lambda f: f.__name__)
def test_what_is_no_file_is_left_out(folder, change):
    path = file_of(folder)
    change(path)
    code, said = run_limited(_look, folder, seconds=10)
    assert code == 0, said
    assert f"WARNING: {path} is a link or no file: left out, and encoded again" in said
    assert os.path.lexists(path)


def _look(folder):
    return 0 if looked(folder)[1] == KEYS else 1


def test_a_file_that_cannot_be_removed(folder, monkeypatch, capsys):
    def forbidden(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    rewrite(folder, drop_checksums)
    monkeypatch.setattr(Path, "unlink", forbidden)
    assert looked(folder)[1] == KEYS
    assert "left out, and cannot be removed" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["file", "dangling"])
def test_a_cache_that_cannot_be_made(tmp_path, kind):
    source = {"dtype": "x"}
    folder, _ = folder_of(tmp_path, "caption", source)
    shutil.rmtree(folder)
    folder.write_text("") if kind == "file" else folder.symlink_to("nothing")
    with pytest.raises(OSError, match=rf"{folder}: a cache cannot be made there \(.*File exists"):
        folder_of(tmp_path, "caption", source)


def test_a_folder_that_is_a_link_is_used(folder, tmp_path):
    """People put caches on other disks."""
    (tmp_path / "link").symlink_to(folder)
    assert looked(tmp_path / "link")[1] == []


# whose it is ---------------------------------------------------------------------------------------------------------


def test_whose_a_cache_is(folder):
    path = file_of(folder)
    assert others(folder) is None
    for place in (path, folder, folder.parent):
        mode = place.stat().st_mode
        place.chmod(mode | 0o020)  # as umask 002 lets it
        assert others(folder) is None
        place.chmod(mode | 0o002)
        assert others(folder) == f"{place} can be written by everybody"
        place.chmod(mode)
    folder.parent.chmod(0o1777)  # as /tmp: nobody can rename what is another's
    assert others(folder) is None
    (folder / "rows-link.safetensors").symlink_to("nothing")
    assert others(folder) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_cache_of_another_user(folder):
    path = file_of(folder)
    for place in (path, folder, folder.parent):
        os.chown(place, 4321, -1)
        assert others(folder) == f"{place} belongs to user 4321"
        os.chown(place, 0, -1)


# runs ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cached(tmp_path, tiny_config):
    """cached(name) -> (exit code of a run with caches on disk, its folder)."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    rows = []
    for number in range(4):
        Image.new("RGB", (32, 32), (60 * number, 9, 99)).save(pictures / f"{number}.png")
        rows.append({"file_name": f"{number}.png", "text": f"a cat {number}"})
    (pictures / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"base.dataset": None, "base.train_data_dir": str(pictures), "base.center_crop": True}
    options |= {"base.caption": "", "base.max_train_steps": 2, "base.train_batch_size": 2}
    options |= {"text_to_image.cache_latents": "disk", "text_to_image.cache_text": "disk"}
    options |= {"text_to_image.validation_prompts": []}
    options |= {"text_to_image.pretrained_model_name_or_path": str(tiny_models.model("sd1"))}
    return lambda name: (main([str(tiny_config("text_to_image", name, **options))]), tmp_path / name)


def test_runs_with_a_cache_of_others(cached, tmp_path, capsys):
    code, plain = cached("first")
    assert code == 0
    [images] = (tmp_path / "encoder-cache").glob("image-*")
    (images / "source.json").write_text("[]")  # forged: the folder's name decides, and nobody reads it
    capsys.readouterr()
    double = {name: torch.cat([value, value]) for name, value in load_file(file_of(images)).items() if "." in name}
    rewrite(images, lambda tensors: tensors.update(double), seal=True)
    assert cached("damaged")[0] == 1
    said = capsys.readouterr().err
    assert "has mean [8, 8, 8], and the encoder writes [4, 8, 8]; the file is removed, and encoded again at the" in said
    code, again = cached("again")
    assert code == 0
    assert "cache latents: 4 of 4 to encode" in capsys.readouterr().out
    assert losses(again) == losses(plain)
    link(file_of(images))
    images.chmod(0o777)
    assert cached("linked")[0] == 0
    said = capsys.readouterr().out
    assert "is a link or no file: left out, and encoded again" in said
    assert f"WARNING: cache latents: {images} can be written by everybody, who can change what is trained" in said
