"""Captioned data in real runs: masks, shuffled tags, files of pairs, too few pictures; and pictures of a class."""

from __future__ import annotations

import json
import sys

import pytest
import tiny_models
import torch
from PIL import Image
from run_folders import read_metrics

import datasets_lib
from scripts import make_class_images
from trainers.common.text_to_image.stable_diffusion import StableDiffusionTrainer

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


def test_without_prompts_captions_of_the_data_are_drawn(run_in_process, pictures, monkeypatch):
    """Held-out ones, else those that are trained on, with the trigger word."""
    asked = []
    original = StableDiffusionTrainer.draw

    def draw(self, requests, *others):
        asked.append(requests)
        return original(self, requests, *others)

    monkeypatch.setattr(StableDiffusionTrainer, "draw", draw)
    run_in_process("data", "lora", **options_of(write_pairs(pictures), **{"base.trigger_word": "inkwash"}))
    assert {request["prompt"] for request in asked[0]} == {"inkwash, sks, red, blue, left, right"}
    asked.clear()
    (pictures / "pairs.jsonl").unlink()
    run_in_process("fixed", "lora", **options_of(pictures, **{"base.trigger_word": "sks", "base.caption": "a cat"}))
    assert {request["prompt"] for request in asked[0]} == {"sks, a cat"}


class Silent:
    """A data set of one's own, without captions."""

    fingerprint = "silent"

    def __len__(self):
        return 4

    def get(self, index, generator):
        return {"image": torch.full((3, 32, 32), index / 4)}


@pytest.mark.parametrize("train_text_encoder", [False, True])
def test_data_of_ones_own_without_captions(run_in_process, train_text_encoder, monkeypatch, capsys):
    monkeypatch.setitem(datasets_lib.DATASETS, "silent", "test_captioned_training:build_silent")
    options = {"base.dataset": "silent", "base.caption": "a fox", "lora.train_text_encoder": train_text_encoder}
    rates = {"unet": 1e-3} | ({"text_encoder": 1e-3} if train_text_encoder else {})
    folder = run_in_process("run", "lora", **options, **{"lora.learning_rate": rates})
    assert len(read_metrics(folder, prefix="loss")) == 6
    assert "NOTE: the data set has no captions: every example has base.caption = 'a fox'" in capsys.readouterr().out


def build_silent(args, split):
    return Silent()


# --- scripts/make_class_images.py


def make_images(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["make_class_images.py", *map(str, arguments)])
    make_class_images.main()


def test_pictures_of_a_class_fill_a_folder_up(tmp_path, monkeypatch, capsys):
    folder, common = tmp_path / "class", ("--steps", 2, "--resolution", 32, "--batch-size", 2)
    make_images(monkeypatch, tiny_models.model("sd1"), "a dog", folder, "--number", 3, *common)
    first = {path.name: path.read_bytes() for path in folder.glob("*.png")}
    assert sorted(first) == ["00000.png", "00001.png", "00002.png"]
    assert len(set(first.values())) == 3
    assert "3 pictures drawn, 3 in all" in capsys.readouterr().out
    (folder / "00001.png").unlink()
    make_images(monkeypatch, tiny_models.model("sd1"), "a dog", folder, "--number", 4, *common)
    assert "2 pictures drawn, 4 in all" in capsys.readouterr().out
    assert {path.name for path in folder.glob("*.png")} == {*first, "00003.png"}
    with Image.open(folder / "00001.png") as again:  # each has its own seed; another batch may round otherwise
        pixels = torch.tensor(list(again.getdata()), dtype=torch.int16)
    before = tmp_path / "before.png"
    before.write_bytes(first["00001.png"])
    with Image.open(before) as old:
        assert (torch.tensor(list(old.getdata()), dtype=torch.int16) - pixels).abs().max() <= 1


def test_another_class_needs_another_folder(tmp_path, monkeypatch):
    common = ("--number", 1, "--steps", 1, "--resolution", 32)
    make_images(monkeypatch, tiny_models.model("sd1"), "a dog", tmp_path / "class", *common)
    with pytest.raises(SystemExit, match=r"was made with other settings \(prompt: a dog -> a cat\); choose a new fol"):
        make_images(monkeypatch, tiny_models.model("sd1"), "a cat", tmp_path / "class", *common)


def test_a_class_folder_that_cannot_be_filled(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="error: "):
        make_images(monkeypatch, tmp_path / "nowhere", "a dog", tmp_path / "class", "--number", 1)
