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
from tiny_models import model

from scripts import inspect_data


def picture(path, width=20, height=16, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (value, 0, 0)).save(path)


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
    assert (
        tokens == f"{counts[0]} to {counts[2]}, median {counts[1]}, start and end tokens included; 1 are cut off at 16"
    )


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


class Grey:
    """Example i is grey of value 5 i."""

    def get(self, index, generator):
        assert generator is None
        return {"image": torch.full((1, 28, 28), 5 * index / 127.5 - 1), "caption": f"number {index}"}


def test_each_cell_shows_its_picture_and_a_text_below():
    sheet = np.asarray(inspect_data.sheet_of(Grey(), list(range(11))).convert("L"))
    side, width, height = 112, 114, 112 + 18  # four times 28; a margin of 2 pixels and a line of 16
    assert sheet.shape == (2 * height + 2, inspect_data.COLUMNS * width + 2)
    for number in range(11):
        top, left = number // inspect_data.COLUMNS * height + 2, number % inspect_data.COLUMNS * width + 2
        assert (sheet[top : top + side, left : left + side] == 5 * number).all()
        assert (sheet[top + side : top + side + 14, left : left + side] < 128).any(), "a line of text"
    assert (sheet[height + 2 :, 3 * width + 2 :] == 255).all()


def test_what_is_transparent_is_white_on_the_sheet():
    class Clear:
        def get(self, index, generator):
            return {"image": torch.cat([torch.zeros(3, 4, 4), torch.full((1, 4, 4), -1.0)])}

    assert (np.asarray(inspect_data.sheet_of(Clear(), [0]))[2:100] == 255).all()


# --- configurations


def test_a_training_command_line_is_read_as_train_py_reads_it(tmp_path, inspect):
    picture(tmp_path / "data" / "a.png")
    options = ["base.train_data_dir=" + str(tmp_path / "data"), "base.max_train_steps=9", "lora.rank=4"]
    code, lines, _ = inspect(*options, dataset_name="x", dataset_config_name="y", resolution=12)
    assert (code, section(lines, "train")["columns"][0]) == (0, "image: float32 [3, 12, 12]")
    assert "base.rezolution" in inspect("base.rezolution=3", dataset="digits", channels=1)[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["base.dataset=null", "base.train_data_dir=none"], "base.train_data_dir: there is no folder"),
        (["--tokenizer", "none"], "--tokenizer: there is no folder .*none; give MODEL/tokenizer"),
        (["--tokenizer", "configs"], "--tokenizer: configs holds no tokenizer (?s:.*); give MODEL/tokenizer"),
        (["--output", "a.jpg"], "--output: a.jpg must be a .png file in a folder that exists"),
        (["--output", "none/a.png"], "--output: none/a.png must be a .png file in a folder that exists"),
    ],
)
def test_what_cannot_be_read_is_said(inspect, arguments, message):
    code, _, error = inspect(*arguments, dataset="digits", channels=1)
    assert code == 1
    assert re.search(f"^error: {message}", error)


# --- what would surprise


def test_what_is_passed_over_and_not_read_is_shown(tmp_path, inspect):
    for name in ("a", "b"):
        picture(tmp_path / "data" / f"{name}.png")
    for name in ("a.json", "b.json", "c.mp4", "notes.doc"):
        (tmp_path / "data" / name).write_text("{}")
    code, lines, _ = inspect(train_data_dir=str(tmp_path / "data"))
    train = section(lines, "train")
    assert code == 0
    assert "passed over, as no pictures that are read: 2 .json, 1 .mp4, 1 .doc" in train["examples"]
    assert "not read: 2 .json with the names of images" in train["captions"][0]


def test_repeats_are_counted_and_a_broken_picture_once(tmp_path, inspect):
    for name in ("3_cat/a", "3_cat/b", "1_dog/c"):
        picture(tmp_path / "data" / f"{name}.png")
    (tmp_path / "data" / "3_cat" / "b.png").write_bytes(b"")
    code, lines, _ = inspect(train_data_dir=str(tmp_path / "data"), folder_repeats=True)
    train = section(lines, "train")
    assert (code, train["examples"][0], train["unusable"][0]) == (1, "7, of 3 pictures", "1")
    assert lines[-1].startswith("1 pictures cannot be used")
    assert train["labels"][1:] == ["0 cat: 6", "1 dog: 1"]


def test_why_there_are_no_labels(tmp_path, inspect):
    picture(tmp_path / "data" / "cat" / "a.png")
    picture(tmp_path / "data" / "b.png")
    _, lines, _ = inspect(train_data_dir=str(tmp_path / "data"))
    [labels] = section(lines, "train")["labels"]
    assert labels.startswith("none: no classes from sub-folders: 1 images, such as")
