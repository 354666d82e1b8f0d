"""The report on a data set, against what was put into it."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from image_sets import build_for_test
from PIL import Image
from reports import section
from repository import ROOT
from tiny_models import model

from datasets_lib.inspect import DEFAULTS, SOURCES, main, read_base
from datasets_lib.report.contact_sheet import COLUMNS, contact_sheet, spread, to_pil
from trainers.engine.config.base_options import BaseConfig
from trainers.engine.config.schema import options


def picture(path, width=20, height=16, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (value, 0, 0)).save(path)


# --- the defaults


def test_the_defaults_are_those_of_the_configuration():
    known = options(BaseConfig)
    for name, default in DEFAULTS.items():
        value = (
            getattr(BaseConfig(dataset="digits", num_epochs=1), name) if name not in SOURCES else known[name].default
        )
        assert value == default, name


def test_every_option_that_a_data_set_reads_has_a_default():
    texts = [path.read_text() for path in (ROOT / "datasets_lib").rglob("*.py") if path.name != "inspect.py"]
    read = {name for text in texts for name in re.findall(r"(?<!_)\bargs\.([a-z_]+)", text)}
    assert read <= set(DEFAULTS)
    assert len(read) > 20


# --- the report


def test_a_folder(tmp_path, inspect):
    data = tmp_path / "data"
    rows = []
    for number in range(10):
        picture(data / f"{number}.png", *((20, 16) if number < 6 else (10 + number, 40)), value=number // 2)
        text = "a cat" if number < 4 else [f"picture {number} of a dog", "dog"]
        rows.append({"file_name": f"{number}.png", "text": text, "label": "cat" if number < 4 else "dog"})
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, lines, _ = inspect(train_data_dir=str(data), resolution=17, center_crop=True)
    train = section(lines, "train")
    assert (code, "validation:" in lines) == (0, False)
    assert train["examples"] == ["10", f"classes from the metadata.jsonl of {data}: cat, dog"]
    assert train["columns"] == [
        "image: float32 [3, 17, 17]", "caption: str", "label: int", "original_size: int64 [2]", "crop_top_left: int64 [2]",
    ]  # fmt: skip
    assert train["heights"] == ["16 to 40, median 16 pixels"]
    assert train["widths"] == ["16 to 20, median 20 pixels"]
    assert train["most frequent"] == ["20 x 16 (width x height), 6 of 10"]
    assert train["enlarged"] == ["7 have a side of less than base.resolution = 17 pixels"]  # the six, and 16 x 40
    same = [f"{data}/{number}.png = {data}/{number + 1}.png" for number in (0, 2, 4)]
    assert train["same pictures"] == ["3 pictures are there more than once", *same]
    assert train["unusable"] == ["0"]
    assert train["labels"] == ["2 classes, examples of each: 4 to 6, median 5", "0 cat: 4", "1 dog: 6"]
    assert train["captions"] == ["16 of 10 examples; 6 examples have several"]
    assert train["words"] == ["1 to 5, median 2"]
    assert train["first"] == [*["'a cat'"] * 4, "'picture 4 of a dog'"]
    assert train["same captions"] == ["2 captions are there more than once", "6 x 'dog'", "4 x 'a cat'"]
    assert train["contact sheet"] == [str(tmp_path / "sheet.png")]


def test_a_set_without_captions_and_a_held_out_part(inspect):
    code, lines, _ = inspect("base.caption=a digit", dataset="digits", channels=1, resolution=8, validation_split=0.1)
    assert code == 0
    train, held_out = section(lines, "train"), section(lines, "validation")
    assert (train["examples"], held_out["examples"]) == (["1,617"], ["180"])
    counts = [int(line.split(": ")[1]) for line in train["labels"][1:]]
    assert (len(counts), sum(counts)) == (10, 1617)
    assert train["captions"] == ["no captions found: every example has base.caption = 'a digit'"]
    assert "words" not in train
    assert "contact sheet" not in held_out


def test_many_classes_are_cut_off(tmp_path, inspect):
    for number in range(43):
        picture(tmp_path / "data" / f"class{number:02d}" / "a.png")
    labels = section(inspect(train_data_dir=str(tmp_path / "data"))[1], "train")["labels"]
    assert labels[-2:] == ["39 class39: 1", "... and 3 more"]


def test_tokens_against_the_tokenizer(tmp_path, inspect):
    from transformers import CLIPTokenizer

    folder = model("sd1") / "tokenizer"
    texts = ["a photo of a cat", "a photo of a dog and of " * 4, "sks"]
    for number, text in enumerate(texts):
        picture(tmp_path / "data" / f"{number}.png")
        (tmp_path / "data" / f"{number}.txt").write_text(text)
    counts = sorted(len(CLIPTokenizer.from_pretrained(folder)(text).input_ids) for text in texts)
    assert counts[1] <= 16 < counts[2]
    _, lines, _ = inspect("--tokenizer", str(folder), train_data_dir=str(tmp_path / "data"))
    [tokens] = section(lines, "train")["tokens"]
    assert tokens == f"{counts[0]} to {counts[2]}, median {counts[1]}, begin and end included; 1 are cut off at 16"


@pytest.mark.parametrize("policy", ["error", "skip"])
def test_all_unusable_files_are_listed(tmp_path, inspect, policy):
    for number in range(8):
        picture(tmp_path / "data" / f"{number}.png")
    (tmp_path / "data" / "0.png").write_bytes(b"")
    (tmp_path / "data" / "3.png").write_text("no picture")
    (tmp_path / "data" / "5.png").write_bytes((tmp_path / "data" / "4.png").read_bytes()[:45])
    code, lines, _ = inspect(train_data_dir=str(tmp_path / "data"), bad_images=policy)
    unusable = section(lines, "train")["unusable"]
    assert (code, unusable[0]) == (1, "3")
    assert [re.match(r"cannot use image .*/(\d).png: \S", line).group(1) for line in unusable[1:]] == ["0", "3", "5"]
    assert lines[-1] == "3 pictures cannot be used, see above: repair or remove them, or set base.bad_images=skip"
    assert section(lines, "train")["most frequent"] == ["20 x 16 (width x height), 5 of 5"]
    assert (tmp_path / "sheet.png").is_file()


def test_only_unusable_files(tmp_path, inspect):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "0.png").write_bytes(b"")
    code, lines, _ = inspect(train_data_dir=str(tmp_path / "data"))
    assert (code, section(lines, "train")["unusable"][0]) == (1, "1")
    assert not (tmp_path / "sheet.png").exists()


def test_masks_and_pictures_of_the_class(tmp_path, inspect):
    picture(tmp_path / "data" / "a.png")
    picture(tmp_path / "data" / "m.png", width=9)
    picture(tmp_path / "dogs" / "b.png")
    (tmp_path / "data" / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x", "mask": "m.png"}')
    prior = {"class_data_dir": str(tmp_path / "dogs"), "class_caption": "a dog"}
    code, lines, _ = inspect(train_data_dir=str(tmp_path / "data"), **prior)
    assert code == 1
    assert re.search(r"a.png: its mask .*m.png: the mask has 9 x 16 pixels", section(lines, "train")["unusable"][1])
    classes = section(lines, "class pictures")
    assert (classes["examples"], classes["unusable"]) == (["1"], ["0"])
    assert "'a dog'" in classes["captions"][0]


def test_a_data_set_of_ones_own(inspect, tmp_path):
    name = f"{build_for_test.__module__}:build_for_test"
    code, lines, _ = inspect(dataset=name, channels=1, resolution=8, dataset_args={"size": 5})
    train = section(lines, "train")
    assert (code, train["examples"], train["columns"]) == (0, ["5"], ["image: float32 [1, 8, 8]"])


# --- the contact sheet


def test_pictures_are_spread_evenly():
    assert spread(range(5)) == [0, 1, 2, 3, 4]
    assert spread(range(95), 48) == list(range(0, 95, 2))
    assert spread([7, 8, 9], 2) == [7, 9]


class Grey:
    """Example i is grey of value 5 i."""

    def get(self, index, generator):
        assert generator is None
        return {"image": torch.full((1, 28, 28), 5 * index / 127.5 - 1), "caption": f"number {index}"}


def test_each_cell_shows_its_picture_and_a_text_below():
    sheet = np.asarray(contact_sheet(Grey(), list(range(11))).convert("L"))
    side, width, height = 112, 118, 112 + 39 + 6  # four times 28; a margin of 6 pixels and three lines of 13
    assert sheet.shape == (2 * height + 6, COLUMNS * width + 6)
    for number in range(11):
        top, left = number // COLUMNS * height + 6, number % COLUMNS * width + 6
        assert (sheet[top : top + side, left : left + side] == 5 * number).all()
        assert (sheet[top + side : top + side + 13, left : left + side] < 128).any(), "a line of text"
    assert (sheet[height + 6 :, 3 * width + 6 :] == 255).all()


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_tensors_become_pictures_again(channels, mode):
    values = torch.arange(channels * 4 * 5, dtype=torch.uint8).view(channels, 4, 5) * 3
    picture = to_pil(values / 127.5 - 1)
    assert (picture.mode, picture.size) == (mode, (5, 4))
    assert np.array_equal(np.asarray(picture).reshape(4, 5, channels), values.permute(1, 2, 0).numpy())


# --- configurations


def test_an_override_of_the_data_set_replaces_it(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("base: {dataset_name: x, dataset_config_name: y, resolution: 12, num_epochs: 3}\nvae: {}\n")
    args = read_base(path, ["base.train_data_dir=pictures", "base.random_flip=true"])
    given = {"train_data_dir": "pictures", "resolution": 12, "random_flip": True}
    assert vars(args) == {**DEFAULTS, **given}
    assert read_base(path, ["base.train_data_dir=null"]).dataset_name == "x"


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("base: {", [], "cannot be read: "),
        ("vae: {}", [], "c.yaml has no section `base` with options"),
        ("- a", [], "c.yaml has no section `base` with options"),
        ("base: 3", [], "c.yaml has no section `base` with options"),
        ("", [], "c.yaml has no section `base` with options"),
        (
            "base: {dataset: digits, resolution: big}",
            [],
            "base.resolution is 'big'; it must be of the type of 64, its default",
        ),
        ("base: {dataset: '${nope}'}", [], "cannot be read: Interpolation key 'nope' not found"),
        ("base: {}", [], "exactly one of dataset_name, train_data_dir, dataset must be set in base, not none"),
        ("base: {dataset: digits, train_data_dir: x}", [], "must be set in base, not train_data_dir and dataset"),
        ("base: {dataset: digit}", [], "base.dataset is 'digit': .*did you mean 'digits'"),
        ("base: {dataset: digits, background_color: wite}", [], "base.background_color is 'wite': must be a colour"),
        ("base: {train_data_dir: none}", [], "base.train_data_dir: there is no folder"),
        (
            "base: {dataset: digits}",
            ["base.resolutoin=3"],
            "the override of base is 'resolutoin'; .*did you mean 'resolution'",
        ),
        ("base: {dataset: digits}", ["resolution=3"], "resolution=3: an override reads base.key=value"),
        (
            "base: {dataset: digits}",
            ["--tokenizer", "none"],
            "--tokenizer: there is no folder .*none; give MODEL/tokenizer",
        ),
        (
            "base: {dataset: digits}",
            ["--tokenizer", "configs"],
            "--tokenizer: configs holds no tokenizer (?s:.*); give MODEL/tokenizer",
        ),
        (
            "base: {dataset: digits}",
            ["--output", "a.jpg"],
            "--output: a.jpg must be a .png file in a folder that exists",
        ),
        (
            "base: {dataset: digits}",
            ["--output", "none/a.png"],
            "--output: none/a.png must be a .png file in a folder that exists",
        ),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path, capsys, text, arguments, message):
    (tmp_path / "c.yaml").write_text(text)
    assert main([str(tmp_path / "c.yaml"), "--output", str(tmp_path / "s.png"), *arguments]) == 1
    assert re.search(message, capsys.readouterr().err)


def test_a_config_that_is_not_there(capsys):
    assert main(["none.yaml"]) == 1
    assert "config file none.yaml does not exist" in capsys.readouterr().err
