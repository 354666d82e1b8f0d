"""From nothing to a LoRA: the pictures that scripts/data/make_digits.py writes, all stages in a few steps, and the judges."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from repository import ROOT
from sklearn.datasets import load_digits

from scripts import sweep
from scripts.benchmarks import measure_style
from scripts.data import make_base, make_digits
from train import main
from trainers.engine.config.config import load_config

STYLES = ("plain", "paper", "colors")
FEW = ["base.logger=none", "base.train_batch_size=20"]
FEW += [f"base.{name}=2" for name in ("max_train_steps", "valid_steps", "checkpointing_steps", "logging_steps")]


def call(script, *arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script.__name__, *map(str, arguments)])
        script.main()


def error(script, *arguments):
    with pytest.raises(SystemExit, match="error: ") as caught:
        call(script, *arguments)
    return str(caught.value)


def make_some(folder):
    """The first 150 digits, for speed."""
    digits = load_digits()
    some = SimpleNamespace(images=digits.images[:150], target=digits.target[:150])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_digits, "load_digits", lambda: some)
        call(make_digits, folder)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits") / "data"
    make_some(folder)
    return folder


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def test_a_digit_is_held_out_in_all_styles_or_in_none(digits):
    target = load_digits().target
    for split, count in (("train", 120), ("validation", 30)):
        rows = [rows_of(digits / style / split) for style in STYLES]
        assert rows[0] == rows[1] == rows[2]
        assert len(rows[0]) == count
        for row in rows[0]:
            assert row["label"] == target[int(row["file_name"][:4])]
            assert row["text"] == f"a handwritten {make_digits.NAMES[row['label']]}"
    names = [{row["file_name"] for row in rows_of(digits / "plain" / split)} for split in ("train", "validation")]
    assert len(names[0] | names[1]) == 150


def test_styles(digits):
    """Plain is the digit itself with a margin; the others are of two colours, and paper is turned to the left."""
    name = rows_of(digits / "plain" / "train")[0]["file_name"]
    read = {s: np.asarray(Image.open(digits / s / "train" / name)).astype(float) for s in STYLES}
    inner = read["plain"][3:29, 3:29, 0]
    small = np.asarray(Image.fromarray(inner.astype(np.uint8)).resize((8, 8), Image.Resampling.BOX)).astype(float)
    assert np.corrcoef(small.ravel(), load_digits().images[int(name[:4])].ravel())[0, 1] > 0.95
    assert read["plain"][:3].max() == read["plain"].std(axis=2).max() == 0
    assert np.array_equal(read["paper"][0, 0], make_digits.INKS[1][1])
    ink = {style: measure_style.shapes(torch.tensor(read[style]).permute(2, 0, 1)[None])[0, 0] for style in STYLES}
    turned = torch.tensor(np.array(Image.fromarray(ink["plain"].numpy()).rotate(25, Image.Resampling.BICUBIC)))
    distance = {style: (ink[style] - turned).square().mean().item() for style in STYLES}
    assert distance["paper"] < 0.2 * distance["plain"]


def test_the_same_pictures_every_time(digits, tmp_path):
    make_some(tmp_path / "again")
    for path in sorted(digits.rglob("00*")):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(digits)).read_bytes()


# --- all stages


@pytest.fixture(scope="module")
def runs(digits, tmp_path_factory):
    """A folder with the runs vae, base, lora and lcm of two steps each, by the shipped configs."""
    torch.set_num_threads(1)
    top = tmp_path_factory.mktemp("zero")

    def train(stage, data, *options):
        paths = [f"base.output_dir={top / stage}", f"base.train_data_dir={digits / data}"]
        assert main([f"configs/zero_to_lora/{stage}.yaml", *FEW, *paths, *options]) == 0

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        train("vae", "colors", "vae.lr_warmup_steps=1", "vae.valid_batch_size=2")
        data = f"base.train_data_dir={digits / 'plain'}"
        call(make_base, top / "vae", "configs/zero_to_lora/base.yaml", top / "blank", "--max-length", 8, data)
        few = [f"{{}}.{option}" for option in ("lr_warmup_steps=1", "valid_batch_size=2", "num_inference_steps=2")]
        for stage, task, source, style in (
            ("base", "text_to_image", "blank", "plain"),
            ("lora", "lora", "base", "paper"),
            ("lcm", "lcm_lora", "base", "plain"),
        ):
            given = [option.format(task) for option in few]
            train(stage, style, f"{task}.pretrained_model_name_or_path={top / source}", *given)
    return top


KEYS = {"pictures", "scale_0_is_base"}
KEYS |= {f"{name}_{key}" for name in ("base", "lora") for key in ("accuracy", "worst", "judge_held_out")}
KEYS |= {f"{a}{name}{b}" for name in ("styled", "styled_shape") for a, b in (("", ""), ("base_", ""), ("", "_judge_held_out"))}  # fmt: skip


def test_all_stages_in_a_few_steps(runs, capsys):
    call(measure_style, runs / "base", runs / "lora", "--number", 12, "--batch-size", 10)
    found = json.loads(capsys.readouterr().out)
    assert set(found) == KEYS
    assert found["pictures"] == 20  # the next whole number of rounds
    assert found["scale_0_is_base"] is True
    for name in ("base", "lora", "styled", "styled_shape"):
        assert found[f"{name}_judge_held_out"] > 0.9
    assert found == json.loads((runs / "lora" / "evaluation" / "metrics.json").read_text())
    width, height = Image.open(runs / "lora" / "evaluation" / "base_and_lora.png").size
    assert width > 10 * 4 * 32
    assert height > 2 * 2 * 4 * 32
    size = sum(parameter.numel() for parameter in unet_of(runs / "base").parameters())
    assert 0.9e6 < size < 1.6e6


def test_few_steps_with_and_without_an_adapter(runs, tmp_path):
    """scripts/sweep.py: the base's options are its own, and its pictures of the last value are what others are compared with."""
    options = ["--vary", "steps=1,2", "--number", 12, "--output", tmp_path / "steps"]
    guided = "text_to_image.guidance_scale=3"
    call(sweep, runs / "lcm", "--base", runs / "base", *options, guided, "lcm_lora.lora_scale=1")
    rows = json.loads((tmp_path / "steps.json").read_text())
    assert [(row["value"], row["weights"]) for row in rows] == [
        ("1", "base"),
        ("1", "raw"),
        ("2", "base"),
        ("2", "raw"),
    ]
    distances = [row["distance"] for row in rows]
    assert distances[2] == 0 < min(distances[0], distances[1], distances[3])
    assert {"class_accuracy", "worst_class_accuracy", "copies"} < rows[0].keys()
    width, height = Image.open(tmp_path / "steps-pictures.png").size
    assert width > 10 * 4 * 32
    assert height > 4 * 4 * 32
    call(sweep, runs / "base", *options, guided)
    alone = json.loads((tmp_path / "steps.json").read_text())
    drawn = ("class_accuracy", "class_diversity", "nearest_distance")
    for with_adapter, row in zip(rows[::2], [row for row in alone if row["weights"] == "ema"], strict=True):
        assert [with_adapter[name] for name in drawn] == [row[name] for name in drawn]
    text = error(sweep, runs / "lcm", "--base", runs / "base", *options, "lora.rank=1")
    assert "lora: an override names this section, the file has base, text_to_image" in text


def unet_of(folder):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(folder / "unet")


def test_the_text_encoder_tells_captions_apart(runs):
    from transformers import CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(runs / "blank" / "tokenizer")
    captions = [make_digits.caption(label) for label in range(10)]
    tokens = tokenizer([*captions, ""], padding="max_length", max_length=8, return_tensors="pt").input_ids
    assert tokens.shape == (11, 8)
    assert ((tokens != tokenizer.pad_token_id).sum(1) == torch.tensor([4] * 10 + [1])).all()  # a token per word
    embeddings = CLIPTextModel.from_pretrained(runs / "blank" / "text_encoder")(tokens)[0].flatten(1)
    distances = torch.cdist(embeddings, embeddings) + 100 * torch.eye(11)
    assert distances.min() > 1


def test_pictures_do_not_depend_on_the_batch(runs):
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(runs / "base", safety_checker=None)
    prompts = [make_digits.caption(label) for label in range(3)]
    one, all_at_once = (measure_style.draw(pipeline, prompts, 5, size, num_inference_steps=2) for size in (1, 3))
    assert one.shape == (3, 3, 32, 32)
    assert torch.allclose(one, all_at_once, atol=1e-5)
    other = measure_style.draw(pipeline, prompts, 6, 3, num_inference_steps=2)
    assert not torch.allclose(other, all_at_once, atol=1e-2)


# --- the judges


def real(digits, style):
    data = f"base.train_data_dir={digits / style}"
    return measure_style.Real.of(load_config("configs/zero_to_lora/base.yaml", [data]))


def test_real_pictures_before_the_judges(digits):
    """Held-out pictures in place of drawings get what the judges get on them; swapped ones are not in the style."""
    plain, paper = real(digits, "plain"), real(digits, "paper")
    assert list(plain.captions.items()) == [(label, make_digits.caption(label)) for label in range(10)]
    labels, pictures = plain.held_out.labels, (plain.held_out.thumbnails, paper.held_out.thumbnails)
    found = measure_style.measure(plain, paper, *pictures, labels)
    assert set(found) == KEYS - {"pictures", "scale_0_is_base"}
    assert found["base_accuracy"] == found["base_judge_held_out"]
    assert found["lora_accuracy"] == found["lora_judge_held_out"]
    for name in ("styled", "styled_shape"):
        both = (found[name] + 1 - found[f"base_{name}"]) / 2  # as many pictures of either kind
        assert both == pytest.approx(found[f"{name}_judge_held_out"])
    swapped = measure_style.measure(plain, paper, *reversed(pictures), labels)
    assert (swapped["styled"], swapped["base_styled"]) == (found["base_styled"], found["styled"])
    upright = plain.held_out.thumbnails * torch.tensor([-0.8, -0.7, -0.4])[:, None, None] + 0.9  # ink on paper
    colored = measure_style.measure(plain, paper, pictures[0], upright, labels)
    assert colored["styled_shape"] == pytest.approx(found["base_styled_shape"], abs=0.02)


def test_shapes_know_no_colors():
    shape = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    shape[..., :3, :], shape[..., 8, 8], shape[..., -3:, :] = 0, 1, 0
    for ink, ground in make_digits.INKS:
        ink, ground = (torch.tensor(color).view(3, 1, 1) / 255 for color in (ink, ground))
        assert torch.allclose(measure_style.shapes(shape * ink + (1 - shape) * ground), shape, atol=1e-5)


def test_base_needs_known_captions(tmp_path, monkeypatch):
    config = ROOT / "configs/zero_to_lora/base.yaml"
    monkeypatch.setattr(make_base.datasets_lib, "build", lambda base, split: SimpleNamespace(captions=lambda: None))
    text = error(make_base, "owner/vae", config, tmp_path / "new")
    assert f"CONFIG = {config}: its data set has no captions() to make a vocabulary of; add them" in text
    assert not (tmp_path / "new").exists()


def test_mistakes(digits, runs, tmp_path):
    assert f"{digits}: exists; choose a new folder" in error(make_digits, digits)
    captions = "configs/zero_to_lora/base.yaml"
    assert f"{runs}: exists; choose a new folder" in error(make_base, runs / "vae", captions, runs)
    text = error(make_base, digits, captions, tmp_path / "new", f"base.train_data_dir={digits / 'plain'}")
    assert f"VAE = {digits}: must be a finished vae run" in text
    assert not (tmp_path / "new").exists()
    assert "is no checkpoint, and holds no run" in error(measure_style, tmp_path, runs / "lora")
    for option, message in (
        ("base.validation_split=null", "base.validation_split = null: judges need held-out pictures"),
        ("base.train_data_dir=unlabelled", "its pictures have no labels; judges need them"),
    ):
        for split in ("train", "validation"):
            (tmp_path / "unlabelled" / split).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32)).save(tmp_path / "unlabelled" / split / "0.png")
        option = option.replace("unlabelled", str(tmp_path / "unlabelled"))
        with pytest.raises(ValueError, match="outputs/zero/base: ") as caught:
            measure_style.Real.of(load_config(captions, [f"base.train_data_dir={digits / 'plain'}", option]))
        assert message in str(caught.value)


@pytest.mark.slow
def test_the_script_twice(tmp_path):
    """The second call finds everything there, and measures the same."""
    found = []
    for _ in range(2):
        command = ["scripts/zero_to_lora.sh", "--fast", str(tmp_path / "zero")]
        settings = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        found.append((tmp_path / "zero/lora/evaluation/metrics.json").read_text())
    assert found[0] == found[1]
    assert set(json.loads(found[0])) == KEYS
    made = {path.name for path in (tmp_path / "zero").iterdir()}
    assert made - {"encoder-cache"} == {"data", "vae", "blank", "base", "lora"}  # with hashes of the base's files
