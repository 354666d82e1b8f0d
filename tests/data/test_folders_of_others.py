"""Folders as other tools, systems and people make them."""

from __future__ import annotations

import os
import re
import shutil

import pytest
import torch
from image_folders import build, captions, examples, labels, save, values, write
from PIL import Image

import datasets_lib
from datasets_lib.images.source import digest

# --- splits


def split_folders(tmp_path, *folders):
    for number, name in enumerate(folders):
        save(tmp_path / name / "a.png", number)
    return tmp_path


@pytest.mark.parametrize("held_out", ["test", "val", "valid", "validation", "Test", "testing"])
def test_folders_of_splits_are_no_classes(tmp_path, held_out):
    top = split_folders(tmp_path, "train/cat", "train/dog", f"{held_out}/cat", f"{held_out}/dog")
    dataset = build(top)
    assert (values(dataset), dataset.label_names) == ([0, 1], ["cat", "dog"])
    assert dataset.notes[0] == (
        f"trains on the sub-folder train of {top}, and not on {held_out}: name one in base.validation_split"
    )
    named = build(top, validation_split=held_out)
    assert (values(named), values(build(top, "validation", validation_split=held_out))) == ([0, 1], [2, 3])
    part = build(top, validation_split=0.5), build(top, "validation", validation_split=0.5)
    assert sorted(values(part[0]) + values(part[1])) == [0, 1]


def test_a_folder_train_alone_is_what_is_trained_on(tmp_path):
    dataset = build(split_folders(tmp_path, "train/cat", "train/dog"))
    assert (dataset.label_names, labels(dataset)) == (["cat", "dog"], [0, 1])
    assert dataset.notes[0] == f"trains on the sub-folder train of {tmp_path}"


ASKED = {
    ("cat", "dog", "test"): ([0, 1], ["cat", "dog"]),
    ("train", "test", "more"): ([0], None),
    ("Validation", "x", "y"): ([1, 2], ["x", "y"]),
    ("cat", "dog", "test", "val"): ([0, 1], ["cat", "dog"]),
    ("dev", "cat", "dog"): ([1, 2], ["cat", "dog"]),
}


@pytest.mark.parametrize("folders", ASKED)
def test_what_might_be_held_out_is_asked_about(tmp_path, folders):
    """Who follows the advice trains on no folder that is called like a split to hold out."""
    top = split_folders(tmp_path, *folders)
    held_out = next(name for name in sorted(folders) if name.lower() in ("dev", "test", "val", "validation"))
    message = rf"has images in {held_out}.*, which is what splits to hold out are called, .*validation_split={held_out}"
    with pytest.raises(ValueError, match=message):
        build(top)
    train = build(top, validation_split=held_out)
    assert (values(train), train.label_names) == ASKED[folders]
    left = "not trained on, as it is called like a split to hold out: val"
    assert (left in train.notes) == ("val" in folders)


@pytest.mark.parametrize("folders", [("val",), ("test", "val")])
def test_only_what_is_held_out(tmp_path, folders):
    with pytest.raises(ValueError, match="which is what splits to hold out are called"):
        build(split_folders(tmp_path, *folders))


@pytest.mark.parametrize(
    ("train", "others"),
    [
        ("Train", ("Val", "Test")), ("training", ("val", "test")), ("Training", ("Testing",)),
        ("training_set", ("test_set",)), ("train2017", ("val2017", "test2017")), ("seg_train", ("seg_test",)),
        ("train_images", ("test_images",)), ("train", ("dev",)), ("train", ("eval", "holdout")),
    ],
)  # fmt: skip
@pytest.mark.parametrize("above", ["", "archive/", "a/b/"])
def test_spellings_of_splits(tmp_path, train, others, above):
    names = [f"{above}{split}/{name}" for split in (train, *others) for name in ("cat", "dog")]
    dataset = build(split_folders(tmp_path, *names))
    assert (values(dataset), dataset.label_names) == ([0, 1], ["cat", "dog"])
    assert dataset.notes[0].startswith(f"trains on the sub-folder {above}{train} of {tmp_path}, and not on ")


@pytest.mark.parametrize(
    ("train", "held_out", "left"),
    [("Train", "Val", ["Test"]), ("training", "test", ["val"]), ("Training", "Testing", [])],
)
def test_a_named_split_of_any_spelling(tmp_path, train, held_out, left):
    names = [f"{split}/{name}" for split in (train, held_out, *left) for name in ("cat", "dog")]
    top = split_folders(tmp_path, *names)
    dataset, held = (build(top, split, validation_split=held_out) for split in ("train", "validation"))
    assert (values(dataset), values(held), labels(dataset), labels(held)) == ([0, 1], [2, 3], [0, 1], [0, 1])


@pytest.mark.parametrize(
    "folders", [("train_1", "train_2", "test_1"), ("DIV_train_HR", "DIV_train_LR", "DIV_valid_HR")]
)
def test_several_folders_to_train_on_beside_one_to_hold_out(tmp_path, folders):
    with pytest.raises(ValueError, match=f"has images in {folders[2]}, which is what splits to hold out are called"):
        build(split_folders(tmp_path, *folders))


def test_metadata_above_the_folder_of_a_split(tmp_path):
    for number, name in enumerate(("train/a", "val/b")):
        save(tmp_path / "data" / "images" / f"{name}.png", number)
    rows = [{"file_name": f"{name}.png", "text": name} for name in ("train/a", "val/b")]
    write(tmp_path / "data" / "images" / "metadata.jsonl", *rows)
    assert captions(build(tmp_path / "data")) == ["train/a"]


def test_captions_above_the_folder_of_a_split_are_named(tmp_path):
    for name in ("train/a", "val/b"):
        save(tmp_path / f"{name}.png")
    (tmp_path / "captions.csv").write_text("")
    with pytest.raises(ValueError, match="not read: .*captions.csv"):
        datasets_lib.check_captions(build(tmp_path, caption=None))


def test_the_fingerprint_of_a_folder_train_is_that_of_before(tmp_path):
    """Its paths are those below the folder that is named, as before it was looked into."""
    dataset = build(split_folders(tmp_path, "train"))
    row = digest([("train/a.png", (tmp_path / "train" / "a.png").stat().st_size)], None, None)
    assert dataset.source.fingerprint == row


def test_folders_beside_train_are_named_if_a_split_is(tmp_path):
    dataset = build(split_folders(tmp_path, "train", "car", "val"), validation_split="val")
    assert dataset.notes[0] == "trains on the sub-folder train alone, not on car"


@pytest.mark.parametrize("folders", [("bullet train", "crash test"), ("contest", "trains"), ("evaluator", "tester")])
def test_names_that_contain_such_words(tmp_path, folders):
    dataset = build(split_folders(tmp_path, *folders, "other"))
    assert dataset.label_names == sorted([*folders, "other"])


def test_a_class_may_be_called_train(tmp_path):
    dataset = build(split_folders(tmp_path, "car", "plane", "train"))
    assert dataset.label_names == ["car", "plane", "train"]


def test_pictures_beside_a_folder_test_are_asked_about(tmp_path):
    save(split_folders(tmp_path, "test") / "b.png")
    with pytest.raises(ValueError, match="has images in test"):
        build(tmp_path)


# --- what systems make


@pytest.mark.parametrize(
    "name", ["@eaDir", "#recycle", "$RECYCLE.BIN", "__MACOSX", "lost+found", "@Recycle", "@__thumb"]
)
def test_folders_of_systems_are_no_data(tmp_path, name):
    top = split_folders(tmp_path, "cat", "dog", f"{name}/a.png", f"cat/{name}/a.jpg")
    dataset = build(top)
    assert (values(dataset), dataset.label_names, dataset.notes[1:]) == ([0, 1], ["cat", "dog"], [])


def test_a_file_called_so_is_data(tmp_path):
    save(tmp_path / "__MACOSX.png", 3)
    assert values(build(tmp_path)) == [3]


# --- links and files that are not there


def test_a_link_that_leads_nowhere_is_a_broken_image(tmp_path):
    for number in range(12):
        save(tmp_path / f"{number:02}.png", number)
    (tmp_path / "03.png").unlink()
    (tmp_path / "03.png").symlink_to("gone.png")
    dataset = build(tmp_path)
    with pytest.raises(ValueError, match=r"cannot use image .*03.png: .*there is no such file.*base.bad_images=skip"):
        dataset.get(3, None)
    skipping = build(tmp_path, bad_images="skip")
    assert values(skipping) == [0, 1, 2, 4, *range(4, 12)]
    assert skipping.bad_count == 1


def test_a_link_through_a_folder_that_is_not_there(tmp_path):
    save(tmp_path / "a.png", 1)
    (tmp_path / "b.png").symlink_to("gone/deep/x.png")
    dataset = build(tmp_path)
    with pytest.raises(ValueError, match=r"cannot use image .*b.png: .*there is no such file"):
        dataset.get(1, None)


def test_a_text_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("x")
    opened = type(tmp_path).open

    def refused(path, *arguments, **options):
        if path.name == "a.txt":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(type(tmp_path), "open", refused)
    with pytest.raises(
        datasets_lib.errors.FileError, match=r"a.txt: cannot be read \(Permission denied\); check its perm"
    ):
        build(tmp_path)


# --- classes


def test_a_stray_picture_beside_class_folders_is_named(tmp_path):
    save(split_folders(tmp_path, "cat", "dog") / "stray.png")
    dataset = build(tmp_path)
    assert dataset.no_labels == f"no classes from sub-folders: 1 images, such as {tmp_path}/stray.png, are in none"


def test_one_class_folder_alone_is_named(tmp_path):
    assert build(split_folders(tmp_path, "cat")).no_labels == "no classes from sub-folders: all images are in one, cat"


def test_a_flat_folder_has_nothing_to_explain(tmp_path):
    save(tmp_path / "a.png")
    assert build(tmp_path).no_labels is None


def test_class_folders_that_look_equal_are_equal(tmp_path):
    top = split_folders(tmp_path, "caf\u00e9", "cafe\u0301", "tea", "tea ")
    dataset = build(top)
    assert (dataset.label_names, sorted(labels(dataset))) == (["caf\u00e9", "tea"], [0, 0, 1, 1])


# --- hub layouts


@pytest.mark.parametrize("name", ["data/train-00000-of-00001.parquet", "data.arrow"])
def test_a_hub_layout_names_the_option_that_reads_it(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("x")
    with pytest.raises(
        ValueError, match=rf"saw 1 .*; base.dataset_name={re.escape(str(tmp_path))} instead .*streaming"
    ):
        build(tmp_path)


def test_tars_name_streaming(tmp_path):
    (tmp_path / "0.tar").write_text("x")
    with pytest.raises(ValueError, match=r"saw 1 .tar; base.streaming=true reads .tar files"):
        build(tmp_path)


# --- masks


def masked(tmp_path, *masks):
    for number, name in enumerate("ab"):
        save(tmp_path / f"{name}.png", 10 + number)
    for number, name in enumerate(masks):
        save(tmp_path / name, 100 + number)
    return tmp_path


@pytest.mark.parametrize(
    "names", [("a-masklabel.png", "b-masklabel.png"), ("mask/a.png", "mask/b.jpg"), ("masks/a.png", "b-masklabel.png")]
)
def test_masks_beside_pictures(tmp_path, names):
    top = masked(tmp_path, *names)
    plain = build(top)
    assert values(plain) == [10, 11]
    assert plain.notes in [[f"2 masks such as {top / name} are not used: set base.mask_files"] for name in names]
    dataset = build(top, mask_files=True)
    found = [round(float(example["mask"].mean()) * 255) for example in examples(dataset)]
    assert (values(dataset), found) == ([10, 11], [100, 101])
    assert dataset.fingerprint != plain.fingerprint


SURE = [("images/a", "masks/a"), ("img/a", "mask/a"), ("A", "A-MaskLabel"), ("caf\u00e9", "mask/cafe\u0301")]
SURE += [("deep/images/a", "deep/masks/a"), ("images/a", "masks/a_mask"), ("a", "mask/a-mask")]
LIKELY = [("a", "a_mask"), ("A", "A_MASK"), ("x/a", "x/a-mask"), ("a", "a.mask")]


@pytest.mark.parametrize(("image", "mask"), [*SURE, *LIKELY])
def test_masks_of_other_names(tmp_path, image, mask):
    """A picture called a_mask may be one of a mask, so it is one until masks are asked for."""
    save(tmp_path / f"{image}.png", 10)
    save(tmp_path / f"{mask}.png", 100)
    assert sorted(values(build(tmp_path))) == ([10] if (image, mask) in SURE else [10, 100])
    [example] = examples(build(tmp_path, mask_files=True))
    assert round(float(example["mask"].mean()) * 255) == 100


@pytest.mark.parametrize(
    "names", [("mask", "no_mask"), ("mask", "pumpkin", "witch"), ("Gas_mask", "mask"), ("face", "masks")]
)
def test_a_class_may_be_called_mask(tmp_path, names):
    """Its pictures have the same names as those of the other classes."""
    dataset = build(split_folders(tmp_path, *names))
    assert (dataset.label_names, len(dataset)) == (sorted(names), len(names))


def test_pictures_that_belong_to_another_one(tmp_path):
    """OneTrainer's conditioning pictures, and a second mask."""
    for number, name in enumerate(("a", "a-condlabel", "a-masklabel", "mask/a")):
        save(tmp_path / f"{name}.png", number)
    dataset = build(tmp_path)
    assert values(dataset) == [0]
    assert dataset.notes[0] == "2 images that belong to another one by their names are not used"


def test_masks_are_no_pictures_of_the_class(tmp_path):
    for number, name in enumerate(("data/b", "class/a", "class/a-masklabel", "class/mask/a")):
        save(tmp_path / f"{name}.png", number)
    dataset = build(tmp_path / "data", class_data_dir=str(tmp_path / "class"), class_caption="x")
    assert len(dataset.prior) == 1


def test_a_picture_without_a_mask_is_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"base.mask_files = true: .*/b.png has no mask; add b-masklabel.png or mask/b.png"
    ):
        build(masked(tmp_path, "a-masklabel.png"), mask_files=True)


def test_what_is_called_like_a_mask_of_nothing_is_a_picture(tmp_path):
    top = masked(tmp_path, "c-masklabel.png", "mask/d.png")
    dataset = build(top)
    assert (values(dataset), dataset.notes) == ([10, 11, 100, 101], [])


def test_pictures_in_a_folder_mask_that_metadata_lists_are_pictures(tmp_path):
    top = masked(tmp_path, "mask/a.png")
    write(top / "metadata.jsonl", *[{"file_name": name, "text": name} for name in ("a.png", "b.png", "mask/a.png")])
    assert captions(build(top)) == ["a.png", "b.png", "mask/a.png"]


# --- kohya's repeats


def kohya(tmp_path):
    for number, name in enumerate(("3_ohwx cat/a", "3_ohwx cat/b", "1_a dog/c")):
        save(tmp_path / f"{name}.png", number)
    (tmp_path / "3_ohwx cat" / "a.txt").write_text("a cat, on a mat")
    return tmp_path


def test_folders_called_by_their_repeats(tmp_path):
    dataset = build(kohya(tmp_path), folder_repeats=True)
    assert sorted(values(dataset)) == [0, 0, 0, 1, 1, 1, 2]
    found = dict(zip(values(dataset), captions(dataset), strict=True))
    assert found == {0: "a cat, on a mat", 1: "ohwx cat", 2: "a dog"}
    assert dataset.label_names == ["a dog", "ohwx cat"]
    assert len(dataset.pictures) == 3


def test_repeats_in_names_are_proposed(tmp_path):
    save(tmp_path / "10_cat" / "a.png")
    [note] = build(tmp_path).notes
    assert note.startswith(f"the sub-folders of {tmp_path} are called like kohya's 10_name: base.folder_repeats=true")
    save(tmp_path / "other" / "a.png")
    assert not any("kohya" in note for note in build(tmp_path).notes)


@pytest.mark.parametrize("name", ["cat/a.png", "0_cat/a.png", "a.png", "x_cat/a.png", "10/a.png", "10_/a.png"])
def test_a_folder_without_repeats_is_named(tmp_path, name):
    save(tmp_path / name)
    with pytest.raises(
        ValueError, match=r"base.folder_repeats = true: .*a.png is in no sub-folder called like 10_name"
    ):
        build(tmp_path, folder_repeats=True)


def test_an_epoch_counts_repeats_and_each_draw_is_its_own(tmp_path):
    """A repeated picture is cropped anew each time."""
    (tmp_path / "4_x").mkdir()
    rows = torch.arange(64, dtype=torch.uint8)[:, None].expand(64, 16)
    Image.fromarray(rows.numpy().copy()).save(tmp_path / "4_x" / "a.png")
    dataset = build(tmp_path, folder_repeats=True)
    assert len(dataset) == 4
    drawn = [float(dataset.get(n, torch.Generator().manual_seed(n))["image"].mean()) for n in range(4)]
    assert len(set(drawn)) > 1


def test_a_copy_of_a_folder_is_the_same_data(tmp_path):
    shutil.copytree(kohya(tmp_path / "one"), tmp_path / "two")
    os.utime(tmp_path / "two" / "1_a dog" / "c.png")
    one, two = (build(tmp_path / name, folder_repeats=True) for name in ("one", "two"))
    assert one.fingerprint == two.fingerprint
