from __future__ import annotations

import re
import shutil

import pytest
from image_folders import build, captions, examples, labels, save, values, write

# --- what is found


def test_images_of_any_depth_in_order_and_hidden_files_ignored(tmp_path):
    save(tmp_path / "b.PNG", 1)
    save(tmp_path / "a" / "deep" / "c.webp", 2)
    save(tmp_path / ".thumbnails" / "d.png", 3)
    (tmp_path / "._b.png").write_text("left by another system")
    (tmp_path / "readme.md").write_text("no image")
    dataset = build(tmp_path, caption="a picture")
    assert values(dataset) == [1, 2]
    assert captions(dataset) == ["a picture"] * 2
    assert (dataset.label_names, dataset.notes) == (None, [])


def test_a_missing_folder_is_named_in_full(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=rf"base.train_data_dir: there is no folder {re.escape(str(tmp_path))}/pic"
    ):
        build("pictures")


def test_an_empty_folder_says_what_would_have_matched(tmp_path):
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.heic").write_text("")
    with pytest.raises(
        ValueError,
        match=rf"no images in {re.escape(str(tmp_path))}: .*\.png.*saw 1 \.txt, 1 \.heic \(pip .*; check base.train_data_dir",
    ):
        build(tmp_path)


def test_classes_from_metadata(tmp_path):
    for number, name in enumerate(["train/a", "train/b", "train/c", "held/d"]):
        save(tmp_path / f"{name}.png", number)
    (tmp_path / "train" / "metadata.csv").write_text("file_name,label,font\na.png,Q,x\nb.png,K,y\nc.png,Q,y\n")
    (tmp_path / "held" / "metadata.csv").write_text("file_name,label,font\nd.png,Q,z\n")
    train = build(tmp_path, validation_split="held")
    held_out = build(tmp_path, "validation", validation_split="held")
    assert (train.label_names, labels(train), labels(held_out)) == (["K", "Q"], [1, 0, 1], [1])
    assert train.notes == [f"classes from the metadata.csv of {tmp_path / 'train'}: K, Q"]
    fonts = build(tmp_path, validation_split="held", label_column="font")
    assert (fonts.label_names, labels(fonts)) == (["x", "y"], [0, 1, 1])
    with pytest.raises(ValueError, match="base.label_column .*is 'fnt'.*did you mean 'font'"):
        build(tmp_path, validation_split="held", label_column="fnt")


def test_numbers_as_classes_in_metadata(tmp_path):
    for name in "abc":
        save(tmp_path / f"{name}.png")
    rows = [{"file_name": f"{name}.png", "label": label} for name, label in zip("abc", (10, 9, 10), strict=True)]
    write(tmp_path / "metadata.jsonl", *rows)
    dataset = build(tmp_path)
    assert (dataset.label_names, labels(dataset), dataset.highest_label) == (None, [10, 9, 10], 10)
    write(tmp_path / "metadata.jsonl", *[row | {"label": str(row["label"])} for row in rows])
    assert (build(tmp_path).label_names, labels(build(tmp_path))) == (["9", "10"], [1, 0, 1])
    for wrong in (-1, None, " ", 1.5, True):
        write(tmp_path / "metadata.jsonl", rows[0], rows[1] | {"label": wrong}, rows[2])
        assert build(tmp_path).label_names is None  # no mistake for a task without classes
        with pytest.raises(ValueError, match=r"row 2 of .*metadata.jsonl has no class \(found"):
            build(tmp_path, label_column="label")


def test_classes_of_a_held_out_folder_that_do_not_fit(tmp_path):
    for name in ("train/a", "train/b", "held/c"):
        save(tmp_path / f"{name}.png")
    write(tmp_path / "train" / "metadata.jsonl", *[{"file_name": f"{n}.png", "label": i} for i, n in enumerate("ab")])
    for text, message in (
        ("file_name\nc.png\n", "the images in .*held have no classes, and those to train on have"),
        ("file_name,label\nc.png,cat\n", "the class of an image in .*held is 'cat'; those to train on have numbers"),
    ):
        (tmp_path / "held" / "metadata.csv").write_text(text)
        with pytest.raises(ValueError, match=message):
            build(tmp_path, "validation", validation_split="held")
    (tmp_path / "held" / "metadata.csv").write_text("file_name,label\nc.png,1\n")
    assert labels(build(tmp_path, "validation", validation_split="held")) == [1]


def test_a_held_out_folder_with_one_class(tmp_path):
    for name in ("train/cat/a", "train/dog/b", "val/dog/c"):
        save(tmp_path / f"{name}.png")
    assert labels(build(tmp_path, "validation", validation_split="val")) == [1]


@pytest.mark.parametrize("name", ["zero.png", "text.jpg", "truncated.png"])
def test_broken_files_are_named_with_their_path(tmp_path, name):
    save(tmp_path / "whole.png")
    content = {"zero.png": b"", "text.jpg": b"hello", "truncated.png": (tmp_path / "whole.png").read_bytes()[:45]}[name]
    (tmp_path / name).write_bytes(content)
    dataset = build(tmp_path)
    with pytest.raises(
        ValueError, match=rf"cannot use image {re.escape(str(tmp_path / name))}: .*base.bad_images=skip"
    ):
        examples(dataset)
    assert len(examples(build(tmp_path, bad_images="skip"))) == 2


COLUMNS = [("image_column", "base.train_data_dir has no such columns; unset it"), ("label_column", "no metadata in")]


@pytest.mark.parametrize(("option", "message"), COLUMNS)
def test_columns_are_not_for_folders(tmp_path, option, message):
    save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=rf"base.{option} is 'x', but .*{message}"):
        build(tmp_path, **{option: "x"})


# --- labels


def test_sub_folders_are_classes(tmp_path):
    for number, name in enumerate(["dog/a", "cat/b", "cat/deep/c"]):
        save(tmp_path / f"{name}.png", number)
    dataset = build(tmp_path)
    assert dataset.label_names == ["cat", "dog"]
    assert labels(dataset) == [0, 0, 1]
    assert "cat, dog" in dataset.notes[0]


@pytest.mark.parametrize("names", [["cat/a", "cat/b"], ["cat/a", "dog/b", "c"]])
def test_other_sub_folders_are_no_classes(tmp_path, names):
    for name in names:
        save(tmp_path / f"{name}.png")
    dataset = build(tmp_path)
    assert dataset.label_names is None
    assert set(labels(dataset)) == {None}


# --- captions


@pytest.mark.parametrize("column", ["text", "caption", "prompt"])
def test_metadata_jsonl(tmp_path, column):
    save(tmp_path / "x" / "a.png", 1)
    save(tmp_path / "y" / "b.png", 2)
    rows = [{"file_name": "y/b.png", column: "two"}, {"file_name": "x/a.png", column: ["one", "uno"]}]
    write(tmp_path / "metadata.jsonl", *rows, "")
    dataset = build(tmp_path)
    assert dataset.caption_note is None
    assert dataset.label_names is None
    assert (values(dataset), captions(dataset)) == ([2, 1], ["two", "one"])


def test_metadata_csv_and_a_caption_column_by_name(tmp_path):
    save(tmp_path / "a.png")
    write(tmp_path / "metadata.csv", "file_name,text,title", 'a.png,wrong,"a, b"')
    assert captions(build(tmp_path, caption_column="title")) == ["a, b"]
    with pytest.raises(
        ValueError, match=r"base.caption_column .*'titel'; it must be one of: text, title; did you mean 't"
    ):
        build(tmp_path, caption_column="titel")


def test_metadata_without_captions_selects_images(tmp_path):
    save(tmp_path / "a.png", 1)
    save(tmp_path / "b.png", 2)
    write(tmp_path / "metadata.jsonl", {"file_name": "b.png", "width": 16})
    dataset = build(tmp_path, caption="x")
    assert (values(dataset), captions(dataset)) == ([2], ["x"])
    assert re.search("1 of 2 images in .* are not in metadata.jsonl: left out", dataset.notes[0])


@pytest.mark.parametrize("missing", [{}, {"text": None}, {"text": " "}, {"text": []}, {"text": ["a", ""]}, {"text": 3}])
def test_a_missing_caption_names_its_image(tmp_path, missing):
    save(tmp_path / "a.png")
    save(tmp_path / "b.png")
    write(tmp_path / "metadata.jsonl", {"file_name": "a.png", "text": "x"}, {"file_name": "b.png", **missing})
    with pytest.raises(
        ValueError, match=r"image .*b\.png, row 2 of .*metadata\.jsonl, has no caption .*give it a text"
    ):
        build(tmp_path)


def test_text_files_beside_images(tmp_path):
    for name in "ab":
        save(tmp_path / name / "1.png")
        (tmp_path / name / "1.txt").write_text(f"the letter {name} é\n", encoding="utf-8")
    dataset = build(tmp_path)
    assert captions(dataset) == ["the letter a é", "the letter b é"]
    assert labels(dataset) == [0, 1]
    (tmp_path / "a" / "1.txt").unlink()
    with pytest.raises(ValueError, match=r"image .*1\.png \(its text file: 1\.txt\) has no caption"):
        build(tmp_path)


def test_a_caption_column_needs_metadata(tmp_path):
    save(tmp_path / "a.png")
    with pytest.raises(
        ValueError, match=r"base.caption_column is 'text', but there is no metadata.jsonl or metadata.csv"
    ):
        build(tmp_path, caption_column="text")


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        ("{file_name: a}", ValueError, "has the line '{file_name: a}', which is not a JSON object"),
        ("[1]", ValueError, r"has the line '\[1\]', which is not a JSON object"),
        ({"text": "x"}, ValueError, "row 1 of .* has no file_name; name the file relative to"),
        ({"file_name": "gone.png"}, FileNotFoundError, "row 1 of .* names .*gone.png, which is not there or no image"),
        ("", ValueError, "names no image in .*; give each image a row"),
    ],
)
def test_faults_of_metadata(tmp_path, row, error, message):
    save(tmp_path / "a.png")
    write(tmp_path / "metadata.jsonl", row)
    with pytest.raises(error, match=message):
        build(tmp_path)


# --- staying inside


@pytest.mark.parametrize("name", ["../secret.png", "x/../../secret.png", "/secret.png"])
def test_metadata_cannot_lead_out_of_the_folder(tmp_path, name):
    save(tmp_path / "secret.png")
    save(tmp_path / "data" / "a.png")
    write(tmp_path / "data" / "metadata.jsonl", {"file_name": name, "text": "x"})
    with pytest.raises(ValueError, match=rf"row 1 of .* names '{name}', which leads out of the folder; put the image"):
        build(tmp_path / "data")


@pytest.mark.parametrize("name", ["link.png", "link", "link.txt"])
def test_links_cannot_lead_out_of_the_folder(tmp_path, name):
    save(tmp_path / "secret" / "s.png")
    save(tmp_path / "data" / "a.png")
    target = tmp_path / "secret" if name == "link" else tmp_path / "secret" / "s.png"
    (tmp_path / "data" / name).symlink_to(target)
    with pytest.raises(
        ValueError, match=rf"{name} leads out of .*data, as a link or through one; copy it into the folder"
    ):
        build(tmp_path / "data")


def test_a_validation_folder_that_is_a_link_out_is_refused(tmp_path):
    save(tmp_path / "secret" / "s.png")
    save(tmp_path / "data" / "a.png")
    (tmp_path / "data" / "val").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"val leads out of"):
        build(tmp_path / "data", "validation", validation_split="val")


def test_links_inside_the_folder_and_to_it_are_followed(tmp_path):
    save(tmp_path / "data" / "a.png", 5)
    (tmp_path / "data" / "b.png").symlink_to("a.png")
    (tmp_path / "link").symlink_to(tmp_path / "data")
    assert values(build(tmp_path / "link")) == [5, 5]


# --- splits


def test_a_named_validation_folder_is_left_out_of_training(tmp_path):
    for number, name in enumerate(["a", "rest/b", "val/c"]):
        save(tmp_path / f"{name}.png", number)
    assert values(build(tmp_path, validation_split="val")) == [0, 1]
    assert values(build(tmp_path, "validation", validation_split="val")) == [2]


def test_train_beside_validation_and_labels_numbered_as_in_training(tmp_path):
    for number, name in enumerate(["train/cat/a", "train/dog/b", "train/fox/c", "val/dog/d", "val/fox/e", "other/f"]):
        save(tmp_path / f"{name}.png", number)
    train = build(tmp_path, validation_split="val")
    validation = build(tmp_path, "validation", validation_split="val")
    assert values(train) == [0, 1, 2]
    assert validation.label_names == train.label_names == ["cat", "dog", "fox"]
    assert (values(validation), labels(validation)) == ([3, 4], [1, 2])
    save(tmp_path / "val" / "fux" / "g.png")
    with pytest.raises(ValueError, match=r"the class of an image in .*val is 'fux'.*cat, dog, fox; did you mean 'fox'"):
        build(tmp_path, "validation", validation_split="val")


def test_one_metadata_file_for_both_splits(tmp_path):
    for number, name in enumerate(["a", "val/b"]):
        save(tmp_path / f"{name}.png", number)
    write(tmp_path / "metadata.jsonl", *({"file_name": name, "text": name} for name in ("a.png", "val/b.png")))
    assert captions(build(tmp_path, validation_split="val")) == ["a.png"]
    assert captions(build(tmp_path, "validation", validation_split="val")) == ["val/b.png"]


@pytest.mark.parametrize("name", ["vall", "../val", "train"])
def test_a_validation_folder_must_be_a_sub_folder(tmp_path, name):
    save(tmp_path / "val" / "a.png")
    save(tmp_path / "train" / "a.png")
    with pytest.raises(ValueError, match=rf"base.validation_split .* is '{name}'; it must be one of: val"):
        build(tmp_path, validation_split=name)


def test_a_fraction_is_held_out(tmp_path):
    for number in range(10):
        save(tmp_path / f"{number}.png", number)
    held_out = build(tmp_path, "validation", validation_split=0.3)
    assert len(held_out) == 3
    assert sorted(values(build(tmp_path, validation_split=0.3)) + values(held_out)) == list(range(10))


# --- fingerprint


def test_a_copied_folder_has_the_same_fingerprint(tmp_path):
    save(tmp_path / "one" / "x" / "a.png")
    (tmp_path / "one" / "x" / "a.txt").write_text("a")
    shutil.copytree(tmp_path / "one", tmp_path / "two", copy_function=shutil.copyfile)
    before = build(tmp_path / "one").fingerprint
    assert build(tmp_path / "two").fingerprint == before
    (tmp_path / "two" / "x" / "a.txt").write_text("b")
    assert build(tmp_path / "two").fingerprint != before
    (tmp_path / "one" / "x" / "a.png").rename(tmp_path / "one" / "x" / "b.png")
    (tmp_path / "one" / "x" / "a.txt").rename(tmp_path / "one" / "x" / "b.txt")
    assert build(tmp_path / "one").fingerprint != before
