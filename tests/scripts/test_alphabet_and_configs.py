"""scripts/data/make_alphabet.py on real and broken fonts; the shipped configs, on small local data of the same layout."""

from __future__ import annotations

import csv
import shutil
import sys
from pathlib import Path

import datasets
import matplotlib
import numpy as np
import pytest
from PIL import Image
from repository import ROOT
from run_folders import read_metrics

import datasets_lib
from scripts.data import make_alphabet
from train import main
from trainers.engine.config.config import load_config

FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
LATIN = ["DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSerif.ttf", "DejaVuSansMono.ttf"]


@pytest.fixture(scope="module")
def fonts(tmp_path_factory):
    """Four fonts with letters, one of them twice, one without letters, and one that is broken."""
    folder = tmp_path_factory.mktemp("fonts")
    for name in [*LATIN, "STIXSizOneSymReg.ttf"]:
        shutil.copy(FONTS / name, folder)
    shutil.copy(FONTS / LATIN[0], folder / "Zcopy.ttf")
    (folder / "broken.ttf").write_bytes(b"no font")
    (folder / "readme.txt").write_text("no font either")
    return folder


@pytest.fixture(scope="module")
def alphabet(fonts, tmp_path_factory):
    output = tmp_path_factory.mktemp("alphabet") / "data"
    with pytest.MonkeyPatch.context() as patch:
        call(patch, output, "--fonts", fonts, "--held-out", 0.25)
    return output


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["make_alphabet.py", *map(str, arguments)])
    make_alphabet.main()


def test_fonts_are_counted(fonts, tmp_path, monkeypatch, capsys):
    call(monkeypatch, tmp_path / "data", "--fonts", fonts, "--held-out", 0.25)
    text = capsys.readouterr().out
    assert "4 fonts, 3 skipped" in text  # without letters, broken, drawn alike
    assert f"78 pictures in {tmp_path / 'data' / 'train'}, 26 held out" in text


def test_pictures_of_letters(alphabet):
    with (alphabet / "train" / "metadata.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 78
    assert set(rows[0]) == {"file_name", "label", "font"}
    assert {row["label"] for row in rows} == set("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    for row in rows:
        pixels = np.asarray(Image.open(alphabet / "train" / row["file_name"]))
        assert (pixels.shape, pixels.dtype) == ((32, 32), np.uint8)
        assert pixels.max() == 255
        assert pixels.min() < 64  # black on white
        border = np.concatenate(
            [pixels[:2].ravel(), pixels[-2:].ravel(), pixels[:, :2].ravel(), pixels[:, -2:].ravel()]
        )
        assert border.min() == 255  # the margin
        ink = np.nonzero(pixels < 255)
        assert max(np.ptp(ink[0]), np.ptp(ink[1])) >= 25  # as large as fits
    held_out = {row["font"] for row in csv.DictReader((alphabet / "validation" / "metadata.csv").open())}
    assert held_out.isdisjoint(row["font"] for row in rows)


def test_letters_are_the_right_ones(alphabet):
    """A held-out font's letters are nearest to the same letters of other fonts, for most."""
    base = load_config("configs/alphabet.yaml", [f"base.train_data_dir={alphabet}"]).base
    sets = [datasets_lib.build(base, split) for split in ("train", "validation")]
    assert sets[0].label_names == list("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    (known, letters), (held_out, expected) = (
        (
            np.stack([s.get(i, None)["image"].numpy().ravel() for i in range(len(s))]),
            np.array([s.get(i, None)["label"] for i in range(len(s))]),
        )
        for s in sets
    )
    nearest = np.linalg.norm(held_out[:, None] - known[None], axis=2).argmin(1)
    assert (letters[nearest] == expected).mean() >= 0.8


def test_a_collection_of_fonts(fonts, tmp_path):
    from fontTools.ttLib import TTCollection, TTFont

    collection = TTCollection()
    collection.fonts = [TTFont(fonts / name) for name in LATIN[:2]]
    collection.save(tmp_path / "both.ttc")
    assert make_alphabet.faces_with_letters(tmp_path / "both.ttc", "AZ") == (
        [(tmp_path / "both.ttc", 0), (tmp_path / "both.ttc", 1)], 0,
    )  # fmt: skip


def test_fonts_of_one_name_in_two_folders(tmp_path, monkeypatch):
    for number, name in enumerate(LATIN):
        (tmp_path / "fonts" / str(number)).mkdir(parents=True)
        shutil.copy(FONTS / name, tmp_path / "fonts" / str(number) / "Regular.ttf")
    call(monkeypatch, tmp_path / "data", "--fonts", tmp_path / "fonts", "--held-out", 0.25)
    with (tmp_path / "data" / "train" / "metadata.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["font"] for row in rows} == {"Regular", "Regular_2", "Regular_3"}
    assert len({row["file_name"] for row in rows}) == 78 == len(list((tmp_path / "data" / "train").rglob("*.png")))


def test_the_systems_fonts(monkeypatch, fonts):
    listed = "\n".join([str(fonts / LATIN[1]), str(fonts / LATIN[0]), str(fonts / LATIN[0]), "/bitmap.pcf.gz"])
    monkeypatch.setattr(make_alphabet.shutil, "which", lambda name: "/usr/bin/fc-list")
    done = lambda *a, **o: make_alphabet.subprocess.CompletedProcess(a, 0, stdout=listed)  # noqa: E731
    monkeypatch.setattr(make_alphabet.subprocess, "run", done)
    assert make_alphabet.find_fonts(None) == [fonts / LATIN[1], fonts / LATIN[0]]
    listed = ""
    with pytest.raises(FileNotFoundError, match="fontconfig knows no font file; install fonts, or name a folder"):
        make_alphabet.find_fonts(None)
    monkeypatch.setattr(make_alphabet.shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match="fc-list of fontconfig is not installed; name a folder"):
        make_alphabet.find_fonts(None)


def test_mistakes(fonts, tmp_path, monkeypatch):
    (tmp_path / "one").mkdir()
    shutil.copy(fonts / LATIN[0], tmp_path / "one")
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ([tmp_path, "--fonts", fonts], "exists; choose a new folder"),
        ([tmp_path / "new", "--fonts", fonts, "--held-out", 0.7], "--held-out 0.7: must be above 0 and at most 0.5"),
        ([tmp_path / "new", "--fonts", tmp_path / "none"], "no such folder"),
        ([tmp_path / "new", "--fonts", tmp_path / "empty"], "holds no .otc, .otf, .ttc, .ttf file"),
        (
            [tmp_path / "new", "--fonts", tmp_path / "one"],
            "1 fonts with all of A to Z were found, 0 were skipped; two are",
        ),
    ):
        with pytest.raises(SystemExit, match="error: ") as caught:
            call(monkeypatch, *arguments)
        assert message in str(caught.value)
        assert not (tmp_path / "new").exists()


# --- shipped configs

TINY = ["base.max_train_steps=2", "base.train_batch_size=4", "base.logging_steps=1", "base.logger=none"]


def hub_layout(folder, column, names, shape):
    """A data set with train and test splits and the features of the hub's, 20 and 10 rows."""
    features = datasets.Features({column: datasets.Image(), "label": datasets.ClassLabel(names=names)})
    generator = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 10)):
        images = [Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)) for _ in range(count)]
        rows = datasets.Dataset.from_dict({column: images, "label": [n % 10 for n in range(count)]}, features=features)
        (folder / "data").mkdir(parents=True, exist_ok=True)
        rows.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


CIFAR_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
HUB = {
    "mnist": ("image", [str(digit) for digit in range(10)], (28, 28)),
    "cifar10": ("img", CIFAR_CLASSES, (32, 32, 3)),
}


@pytest.mark.parametrize("name", HUB)
def test_hub_configs_on_local_data_of_the_same_features(name, tmp_path):
    """Everything of the config but the network, the length and what needs a download."""
    data = hub_layout(tmp_path / "data", *HUB[name])
    network = tmp_path / "network.json"
    text = (ROOT / "configs/tests/models/unet2d.json").read_text()
    network.write_text(text if name == "mnist" else text.replace('channels": 1', 'channels": 3'))
    options = [f"base.dataset_name={data}", f"base.output_dir={tmp_path / 'run'}", "base.checkpointing_steps=2"]
    options += [f"conditional_ddpm.model_config={network}", "conditional_ddpm.ddpm_num_inference_steps=2"]
    options += ["base.dataloader_num_workers=0", "base.save_model_epochs=null", "base.eval_steps=null"]
    options += ["base.eval_num_samples=1000"] if name == "cifar10" else []
    assert main([f"configs/{name}.yaml", *TINY, *options]) == 0
    from trainers.common.class_pipeline import ClassConditionalPipeline

    pipeline = ClassConditionalPipeline.from_pretrained(tmp_path / "run")
    assert pipeline.label_names == HUB[name][1]
    assert pipeline(HUB[name][1][3], num_inference_steps=2).images[0].size == (32, 32)
    assert set(read_metrics(tmp_path / "run", prefix="valid")[-1]) >= {"valid/loss", "valid_ema/loss"}


def test_the_alphabets_config(alphabet, tmp_path):
    options = [f"base.train_data_dir={alphabet}", f"base.output_dir={tmp_path / 'run'}", "base.valid_steps=2"]
    options += [
        "conditional_ddpm.model_config=configs/tests/models/unet2d.json",
        "conditional_ddpm.ddpm_num_inference_steps=2",
    ]
    assert main(["configs/alphabet.yaml", *TINY, *options]) == 0
    side = 2 * 32 + 2  # 26 columns, raw and averaged weights below each other, two rows each
    assert Image.open(tmp_path / "run/samples/samples-step-000002.png").size == (26 * side + 2, 2 * (2 * side + 2) + 8)


@pytest.mark.parametrize(
    "path",
    sorted([*(ROOT / "configs").glob("*.yaml"), *(ROOT / "configs" / "zero_to_lora").glob("*.yaml")]),
    ids=lambda path: path.name,
)
def test_a_config_says_how_to_run_it_and_what_came_out(path):
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    text = "\n".join(header)
    assert "accelerate launch" in text or "scripts/quickstart.sh" in text
    assert "not yet run" in text or ("Measured" in text and "steps" in text and "minutes" in text)
    load_config(path)
