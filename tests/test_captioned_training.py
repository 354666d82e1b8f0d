"""Captioned data in real runs: masks, shuffled tags, files of pairs, too few pictures; and pictures of a class."""

from __future__ import annotations

import json
import sys

import pytest
import tiny_models
import torch
from conftest import read_metrics
from PIL import Image

from scripts import make_class_images
from trainers.common.stable_diffusion import StableDiffusionTrainer

COLUMNS = ["caption", "mask", "original_size"]


@pytest.fixture
def seen(monkeypatch):
    """What compute_loss finds in its batches."""
    batches = []
    original = StableDiffusionTrainer.compute_loss

    def compute_loss(self, batch, rng, step):
        batches.append({name: batch[name] for name in (*COLUMNS, "slot") if name in batch})
        return original(self, batch, rng, step)

    monkeypatch.setattr(StableDiffusionTrainer, "compute_loss", compute_loss)
    return batches


@pytest.fixture
def pictures(tmp_path):
    """A folder of five pictures and masks; the mask is white where the picture is red."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(5):
        picture, mask = Image.new("RGB", (40, 32), "blue"), Image.new("L", (40, 32), 0)
        picture.paste("red", (0, 0, 8 * number, 32))
        mask.paste(255, (0, 0, 8 * number, 32))
        picture.save(folder / f"{number}.png")
        mask.save(folder / f"mask-{number}.png")
    return folder


def write_pairs(folder, **columns):
    path = folder / "pairs.jsonl"
    lines = [
        json.dumps({"image": f"{n}.png", "text": "sks, red, blue, left, right"} | {k: v(n) for k, v in columns.items()})
        for n in range(5)
    ]
    path.write_text("\n".join(lines))
    return path


def options_of(path, **more):
    return {"base.dataset": None, "base.train_data_dir": str(path), "base.caption": "", **more}


def test_masked_training_from_a_file_of_pairs(run_in_process, pictures, seen):
    path = write_pairs(pictures, mask=lambda n: f"mask-{n}.png")
    options = options_of(path, **{"base.random_flip": True, "lora.validation_prompts": []})
    folder = run_in_process("run", "lora", **options)
    assert len(read_metrics(folder, prefix="loss")) == 6
    parts = torch.stack([batch["mask"] for batch in seen]).flatten(0, 1)
    assert parts.shape == (24, 1, 32, 32)
    assert {0.0, 1.0} == set(parts.unique().tolist())
    assert {tuple(size) for batch in seen for size in batch["original_size"].tolist()} == {(32, 40)}
    run = run_in_process("cached", "lora", **options, **{"base.center_crop": True, "lora.cache_latents": "memory"})
    assert len(read_metrics(run, prefix="loss")) == 6


def test_tags_are_shuffled_in_training_behind_those_that_are_kept(run_in_process, pictures, seen):
    options = options_of(
        write_pairs(pictures),
        **{
            "base.shuffle_tags": True,
            "base.keep_tags": 1,
            "base.trigger_word": "inkwash",
            "base.validation_split": 0.2,
        },
    )
    run_in_process("run", "lora", **options)
    training = [caption for batch in seen[:6] for caption in batch["caption"]]
    assert {caption.split(", ")[0] for caption in training} == {"inkwash"}
    assert {caption.split(", ")[1] for caption in training} == {"sks"}
    assert {frozenset(caption.split(", ")[2:]) for caption in training} == {frozenset(("red", "blue", "left", "right"))}
    assert len(set(training)) > 8


def test_one_picture_is_enough(run_in_process, pictures, tmp_path):
    (tmp_path / "one").mkdir()
    (pictures / "3.png").rename(tmp_path / "one" / "3.png")
    kept = {"lora.cache_latents": "memory", "lora.train_text_encoder": False, "lora.learning_rate": 1e-3}
    options = options_of(tmp_path / "one", **{"base.caption": "a photo of a cat", "base.center_crop": True, **kept})
    folder = run_in_process("run", "lora", **options, **{"lora.cache_text": "memory"})
    assert read_metrics(folder, prefix="loss")[-1]["epoch"] == 24


# --- scripts/make_class_images.py


def make_images(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["make_class_images.py", *map(str, arguments)])
    make_class_images.main()


def test_pictures_of_a_class_fill_a_folder_up(tmp_path, monkeypatch, capsys):
    folder, common = tmp_path / "class", ("--steps", 2, "--resolution", 32, "--batch-size", 2)
    make_images(monkeypatch, tiny_models.model("sd1"), "a dog", folder, "--number", 3, *common)
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(first) == ["00000.png", "00001.png", "00002.png"]
    assert len(set(first.values())) == 3
    assert "3 pictures drawn, 3 in all" in capsys.readouterr().out
    (folder / "00001.png").unlink()
    make_images(monkeypatch, tiny_models.model("sd1"), "a dog", folder, "--number", 4, *common)
    assert "2 pictures drawn, 4 in all" in capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == {*first, "00003.png"}
    with Image.open(folder / "00001.png") as again:  # each has its own seed; another batch may round otherwise
        pixels = torch.tensor(list(again.getdata()), dtype=torch.int16)
    before = tmp_path / "before.png"
    before.write_bytes(first["00001.png"])
    with Image.open(before) as old:
        assert (torch.tensor(list(old.getdata()), dtype=torch.int16) - pixels).abs().max() <= 1


def test_a_class_folder_that_cannot_be_filled(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="error: "):
        make_images(monkeypatch, tmp_path / "nowhere", "a dog", tmp_path / "class", "--number", 1)
