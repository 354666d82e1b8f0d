"""Captions, masks and pictures of a class: what a text-to-image task finds in an example beside the picture."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from image_folders import build, captions, labels, save, values, write
from image_sets import assert_same, build_for_test, encoded, image_dataset, random_images, seeded, settings
from PIL import Image

import datasets_lib
from trainers.engine.config.config import check_config
from trainers.engine.config.files import ConfigError

# --- a JSON-lines file of pairs


def pairs(folder, *rows):
    write(folder / "pairs.jsonl", *rows)
    return folder / "pairs.jsonl"


def test_a_file_of_pairs(tmp_path):
    for number, name in enumerate(["x/a.png", "y/b.png", "c.png"]):
        save(tmp_path / name, number)
    rows = [
        {"image": "y/b.png", "text": "two"},
        {"image": "x/a.png", "text": ["one", "uno"]},
        {"image": "y/b.png", "text": "zwei"},
    ]
    dataset = build(pairs(tmp_path, *rows))
    assert (values(dataset), captions(dataset)) == ([1, 0, 1], ["two", "one", "zwei"])
    assert (dataset.caption_note, dataset.label_names, dataset.notes) == (None, None, [])
    assert list(dataset.captions()) == ["two", "one", "uno", "zwei"]
    as_metadata = [{"file_name": row["image"], "label": "cat", "title": "t"} for row in rows]
    dataset = build(pairs(tmp_path, *as_metadata), caption_column="title", validation_split=0.3)
    assert (labels(dataset), captions(dataset)) == ([0, 0], ["t", "t"])
    assert dataset.notes == [f"classes from {tmp_path / 'pairs.jsonl'}: cat"]


def test_captions_with_any_line_separator_inside_are_one_line(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "pairs.jsonl").write_text('{"image": "a.png", "text": "one\u2028two\x85"}\r\n', encoding="utf-8")
    assert captions(build(tmp_path / "pairs.jsonl")) == ["one\u2028two\x85"]


def test_a_copied_file_of_pairs_is_the_same_data(tmp_path):
    prints = []
    for name, text in (("one", "x"), ("two", "x"), ("three", "y")):
        save(tmp_path / name / "a.png")
        prints.append(build(pairs(tmp_path / name, {"image": "a.png", "text": text})).fingerprint)
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        (
            {"image": "gone.png"},
            FileNotFoundError,
            r"row 1 of .*pairs.jsonl names .*gone.png, which is not there; add the file",
        ),
        ({"image": "../a.png"}, ValueError, r"row 1 of .*pairs.jsonl names '../a.png', which leads out of the folder"),
        ({"image": "out.png"}, ValueError, r"out.png leads out of .*data, as a link or through one; copy it"),
        (
            {"text": "x"},
            ValueError,
            r"row 1 of .*pairs.jsonl has no image or file_name; name the file relative to .*data",
        ),
        ({"image": {"bytes": ""}}, ValueError, r"row 1 of .*pairs.jsonl has no image or file_name"),
        ({"image": "a.png", "text": " "}, ValueError, r"image .*a.png, row 1 of .*pairs.jsonl, has no caption"),
        ("", ValueError, r"pairs.jsonl names no image in .*data; give each image a row with its image"),
        ("[]", ValueError, r"pairs.jsonl has the line '\[\]', which is not a JSON object"),
    ],
)
def test_faults_of_pairs(tmp_path, row, error, message):
    save(tmp_path / "a.png")
    save(tmp_path / "data" / "a.png")
    (tmp_path / "data" / "out.png").symlink_to(tmp_path / "a.png")
    with pytest.raises(error, match=message):
        build(pairs(tmp_path / "data", row))


def test_a_file_of_pairs_has_one_split(tmp_path):
    save(tmp_path / "a.png")
    with pytest.raises(
        ValueError,
        match=r"base.validation_split is 'val', but .*pairs.jsonl has no named splits; give a fraction",
    ):
        build(pairs(tmp_path, {"image": "a.png"}), validation_split="val")
    with pytest.raises(
        FileNotFoundError, match=r"there is no folder .*none.jsonl; .* or a .jsonl file that lists them"
    ):
        build(tmp_path / "none.jsonl")


@pytest.mark.parametrize("name", ["a.txt", "metadata.csv", "metadata.jsonl"])
def test_text_that_is_not_utf_8_is_named(tmp_path, name):
    save(tmp_path / "a.png")
    (tmp_path / name).write_bytes('{"file_name": "a.png", "text": "é"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"{name} is not UTF-8 text \(.*\); save it as UTF-8"):
        build(tmp_path)


# --- fixed captions, trigger word, tags


def test_a_fixed_caption_beside_those_of_the_data_is_an_error():
    with pytest.raises(
        ValueError, match=r"base.caption is 'x', .* but memory has captions; unset base.caption, .*base.trigger_word"
    ):
        image_dataset(random_images(1), known={"captions": ["a"]}, caption="x")


def test_the_note_on_missing_captions():
    note = "no captions found: every example has base.caption = "
    assert image_dataset(random_images(1)).caption_note == f"{note}''"
    assert (
        image_dataset(random_images(1), caption="a cat", trigger_word="sks").caption_note
        == f"{note}'a cat', with base.trigger_word 'sks' in front"
    )
    assert image_dataset(random_images(1), known={"captions": ["a"]}).caption_note is None


def test_the_trigger_word_is_in_front_of_every_caption():
    known = {"captions": [["a", "b"], "c, d"]}
    dataset = image_dataset(random_images(2), known=known, trigger_word="sks")
    assert captions(dataset) == ["sks, a", "sks, c, d"]
    assert list(dataset.captions()) == ["sks, a", "sks, b", "sks, c, d"]
    assert captions(image_dataset(random_images(1), trigger_word="sks")) == ["sks"]
    assert captions(image_dataset(random_images(1), trigger_word="sks", caption="a cat")) == ["sks, a cat"]


TAGS = "one, two,three ,,four"


def shuffled(count=300, split="train", **changed):
    dataset = image_dataset(
        random_images(1), split, {"captions": [TAGS]}, center_crop=True, shuffle_tags=True, **changed
    )
    return dataset, [dataset.get(0, seeded(seed))["caption"] for seed in range(count)]


@pytest.mark.parametrize(("keep", "orders"), [(0, 24), (1, 6), (2, 2), (3, 1), (9, 1)])
def test_tags_after_the_kept_ones_come_in_every_order(keep, orders):
    dataset, texts = shuffled(keep_tags=keep, trigger_word="sks")
    assert dataset.random
    tags = [text.split(", ") for text in texts]
    assert {first for first, *_ in tags} == {"sks"}
    assert {tuple(rest[:keep]) for _, *rest in tags} == {("one", "two", "three", "four")[:keep]}
    assert {tuple(sorted(rest)) for _, *rest in tags} == {("four", "one", "three", "two")}
    assert len({tuple(rest) for _, *rest in tags}) == orders


def test_tags_are_shuffled_in_training_only_by_the_generator():
    dataset, _ = shuffled(0)
    assert dataset.get(0, None)["caption"] == TAGS
    assert dataset.get(0, seeded(5))["caption"] == dataset.get(0, seeded(5))["caption"]
    assert list(dataset.captions()) == [TAGS]
    validation, texts = shuffled(20, "validation")
    assert (validation.random, set(texts)) == (False, {TAGS})


def test_tags_are_drawn_after_everything_else():
    """The options of captions leave the draws of crop and flip as they are."""
    plain, tagged = [
        image_dataset(random_images(1), known={"captions": [TAGS]}, random_flip=True, shuffle_tags=shuffle)
        for shuffle in (False, True)
    ]
    for seed in range(20):
        left, right = plain.get(0, seeded(seed)), tagged.get(0, seeded(seed))
        assert sorted(right.pop("caption").split(", ")) == ["four", "one", "three", "two"]
        assert left.pop("caption") == TAGS
        assert_same(left, right)


# --- masks


def masked_folder(folder, size=(30, 20), mask_size=None, name="metadata.jsonl", key="file_name"):
    """Pictures whose red is their mask, so that whatever is done to both must keep them equal."""
    draw = np.random.default_rng(0)
    (folder / "masks").mkdir(parents=True)
    rows = []
    for number in range(4):
        pixels = draw.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        image.save(folder / f"{number}.png")
        mask = image.getchannel("R")
        (mask if mask_size is None else mask.resize(mask_size)).save(folder / "masks" / f"{number}.png")
        rows.append({key: f"{number}.png", "text": str(number), "mask": f"masks/{number}.png"})
    write(folder / name, *rows)
    return folder


@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("file", ["metadata.jsonl", "pairs.jsonl"])
def test_a_mask_goes_through_what_its_picture_does(tmp_path, prepared, split, file):
    folder = masked_folder(tmp_path, name=file, key="image" if file == "pairs.jsonl" else "file_name")
    source = folder / file if file == "pairs.jsonl" else folder
    dataset = build(source, split, random_flip=True, validation_split=0.5)
    if prepared:
        dataset.prepare()
    for seed in range(10):
        example = dataset.get(1, seeded(seed))
        datasets_lib.check_example(example, settings())
        assert example["mask"].shape == (1, 16, 16)
        assert torch.allclose(example["mask"], (example["image"][:1] + 1) / 2, atol=1e-6)
        without = dataset.without_image(1, seeded(seed))
        without.pop("flipped"), example.pop("image")
        assert_same(without, example)
    assert dataset.notes == []
    assert torch.equal(dataset.image(1, False), dataset.get(1, None)["image"])


@pytest.mark.parametrize(("column", "given"), [("mask", None), ("mask", "mask"), ("alpha", "alpha")])
def test_masks_of_hub_data_sets(tmp_path, column, given):
    datasets = pytest.importorskip("datasets")
    images = random_images(2)
    masks = [image[..., 0] for image in images]
    table = {"image": [{"bytes": png, "path": None} for png in encoded(images)]}
    table[column] = [{"bytes": png, "path": None} for png in encoded(masks)]
    features = datasets.Features({"image": datasets.Image(), column: datasets.Image()})
    datasets.Dataset.from_dict(table, features=features).save_to_disk(tmp_path / "t")

    def hub(**changed):
        return datasets_lib.build(settings(dataset_name=str(tmp_path / "t"), **changed), "train")

    example = hub(mask_column=given).get(0, None)
    assert torch.allclose(example["mask"], (example["image"][:1] + 1) / 2, atol=1e-6)
    with pytest.raises(ValueError, match=r"base.mask_column is 'maks'; it must be one of: image"):
        hub(mask_column="maks")


def test_a_hub_column_of_masks_must_hold_images(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"image": [{"bytes": encoded(random_images(1))[0], "path": None}], "mask": [3]})
    data.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "t")
    assert "mask" not in datasets_lib.build(settings(dataset_name=str(tmp_path / "t")), "train").get(0, None)
    with pytest.raises(ValueError, match=r"base.mask_column is 'mask', whose .*int64.* values are not images"):
        datasets_lib.build(settings(dataset_name=str(tmp_path / "t"), mask_column="mask"), "train")


def test_masks_are_part_of_the_fingerprint_and_of_no_key(tmp_path):
    folder = masked_folder(tmp_path)
    with_masks = build(folder)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    write(folder / "metadata.jsonl", *[{**row, "mask": "masks/0.png"} for row in rows])
    others = build(folder)
    write(folder / "metadata.jsonl", *[{"file_name": row["file_name"], "text": row["text"]} for row in rows])
    without = build(folder)
    assert len({dataset.fingerprint for dataset in (with_masks, others, without)}) == 3
    assert with_masks.image_keys(2) == without.image_keys(2)
    assert without.notes == [f"4 masks such as {folder}/masks/0.png are not used: set base.mask_files"]


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ("gone.png", FileNotFoundError, r"row 1 of .*metadata.jsonl names .*gone.png, which is not there; add"),
        ("../1.png", ValueError, r"row 1 of .*metadata.jsonl names '../1.png', which leads out of the folder"),
        ("out.png", ValueError, r"out.png leads out of"),
        (None, ValueError, r"row 1 of .*metadata.jsonl has no mask; name the file relative to"),
    ],
)
def test_faults_of_masks(tmp_path, mask, error, message):
    save(tmp_path / "a.png")
    save(tmp_path / "data" / "a.png")
    row = {"file_name": "a.png", "mask": mask}
    if mask == "out.png":
        (tmp_path / "data" / ".hidden").mkdir()
        (tmp_path / "data" / ".hidden" / mask).symlink_to(tmp_path / "a.png")
        row["mask"] = ".hidden/out.png"
    write(tmp_path / "data" / "metadata.jsonl", row)
    with pytest.raises(error, match=message):
        build(tmp_path / "data")


@pytest.mark.parametrize("prepared", [True, False])
def test_a_mask_of_another_size_is_an_error_that_names_both(tmp_path, prepared):
    dataset = build(masked_folder(tmp_path, mask_size=(15, 20)))
    message = r"cannot use image .*0.png: its mask .*masks/0.png: the mask has 15 x 20 pixels, the image 30 x 20"
    with pytest.raises(ValueError, match=message):
        dataset.prepare() if prepared else dataset.get(0, None)
    with pytest.raises(ValueError, match=message):
        dataset.without_image(0, None)


def test_an_unreadable_mask_is_a_broken_picture(tmp_path):
    (masked_folder(tmp_path) / "masks" / "2.png").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"cannot use image .*2.png: its mask .*masks/2.png: it is empty or in no known"
    ):
        build(tmp_path).get(2, None)
    dataset = build(tmp_path, bad_images="skip")
    assert dataset.get(2, None)["caption"] == dataset.without_image(2, None)["caption"] == "3"


def test_masks_need_metadata(tmp_path):
    save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"base.mask_column is 'm', but there is no metadata in"):
        build(tmp_path, mask_column="m")
    write(tmp_path / "metadata.jsonl", {"file_name": "a.png", "text": "x"})
    with pytest.raises(ValueError, match=r"base.mask_column \(a column of .*\) is 'm'; it must be one of: text"):
        build(tmp_path, mask_column="m")


# --- pictures of the class


@pytest.fixture
def dogs(tmp_path):
    for number in range(3):
        save(tmp_path / "dogs" / f"{number}.png", 100 + number)
    (tmp_path / "dogs" / "0.txt").write_text("not read")
    return tmp_path / "dogs"


def prior(folder, dogs, **changed):
    return build(folder, class_data_dir=str(dogs), class_caption="a dog", **changed)


@pytest.fixture
def sks(tmp_path):
    for number, image in enumerate(random_images(4)):
        (tmp_path / "sks").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / "sks" / f"{number}.png")
    return tmp_path / "sks"


def test_every_example_gets_a_picture_of_its_class(sks, dogs):
    options = {"caption": "my dog", "random_flip": True, "trigger_word": "sks"}
    plain, dataset = build(sks, **options), prior(sks, dogs, **options)
    assert len(dataset) == 4
    seen = []
    for seed in range(60):
        example, alone = dataset.get(seed % 4, seeded(seed)), plain.get(seed % 4, seeded(seed))
        datasets_lib.check_example(example, settings())
        seen.append(round(float(example["class_image"].mean() + 1) * 127.5))
        assert (example["caption"], example["class_caption"]) == ("sks, my dog", "a dog")
        assert_same(alone, {key: value for key, value in example.items() if not key.startswith("class_")})
    assert set(seen) == {100, 101, 102}
    assert min(map(seen.count, set(seen))) > 10
    first, second = dataset.get(5 % 4, None), dataset.get(1, None)
    assert_same(first, second)
    assert round(float(first["class_image"].mean() + 1) * 127.5) == 101


def test_pictures_of_the_class_in_an_example_without_pictures(tmp_path, sks):
    draw = np.random.default_rng(1)
    for number in range(3):
        (tmp_path / "cats").mkdir(exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(tmp_path / "cats" / f"{number}.png")
    dataset = prior(sks, tmp_path / "cats", center_crop=True, random_flip=True)
    assert dataset.picture_columns == ("image", "class_image")
    assert [dataset.image_count(column) for column in dataset.picture_columns] == [4, 3]
    for seed in range(20):
        whole, without = dataset.get(2, seeded(seed)), dataset.without_image(2, seeded(seed))
        image, class_image = whole.pop("image"), whole.pop("class_image")
        assert torch.equal(image, dataset.image(2, without.pop("flipped")))
        found = dataset.image(without.pop("class_index"), without.pop("class_flipped"), column="class_image")
        assert torch.equal(class_image, found)
        assert_same(whole, without)
    keys = {key for column in dataset.picture_columns for i in range(3) for key in dataset.image_keys(i, column=column)}
    assert len(keys) == 12
    assert list(dataset.captions()) == [""] * 4
    assert list(dataset.captions("class_caption")) == ["a dog"] * 3


def test_what_the_loop_asks_of_a_data_set_with_a_prior(tmp_path, sks, dogs):
    instances, dataset = build(sks), prior(sks, dogs, bad_images="skip")
    assert dataset.notes == ["3 pictures of the class: 'a dog'"]
    assert (dataset.label_names, dataset.caption_note) == (None, instances.caption_note)
    assert dataset.name(1) == str(sks / "1.png")
    before = dataset.get(0, seeded(3))
    dataset.prepare(show_progress=False)
    assert dataset.prior.pictures.decoded is not None
    assert_same(before, dataset.get(0, seeded(3)))
    assert_same(pickle.loads(pickle.dumps(dataset)).get(1, seeded(1)), dataset.get(1, seeded(1)))
    (dogs / "3.png").write_bytes(b"")
    other = prior(sks, dogs, bad_images="skip")
    assert len({instances.fingerprint, dataset.fingerprint, other.fingerprint}) == 3
    other.prepare(show_progress=False)
    assert other.bad_count == 1
    held_out = build(sks, "validation", validation_split=0.5, class_data_dir=str(dogs), class_caption="a dog")
    assert "class_image" not in held_out.get(0, None)


def test_a_prior_beside_a_data_set_of_ones_own(dogs):
    args = settings(
        dataset=f"{build_for_test.__module__}:build_for_test", class_data_dir=str(dogs), class_caption="a dog"
    )
    dataset = datasets_lib.build(args, "train")
    assert set(dataset.get(0, seeded(0))) >= {"image", "class_image", "class_caption"}
    assert (dataset.name(2), dataset.bad_count) == ("example 2", 0)
    dataset.prepare(show_progress=False)
    assert len(dataset.only([0, 2])) == 2
    assert dataset.captions() is None
    assert set(dataset.captions("class_caption")) == {"a dog"}


def test_class_folders_that_cannot_be_used(tmp_path, sks):
    with pytest.raises(
        FileNotFoundError, match=r"base.class_data_dir: there is no folder .*none; give a folder of pictures"
    ):
        prior(sks, tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"there are no images in .*empty: .*; check base.class_data_dir"):
        prior(sks, tmp_path / "empty")
    save(sks / "class" / "a.png")
    with pytest.raises(
        ValueError, match=r"1 pictures of the class in .*class, such as .*a.png, are examples to train on, too"
    ):
        prior(sks, sks / "class")


# --- options


def problems(**options):
    section = {"pretrained_model_name_or_path": "owner/name"}
    document = {"base": {"dataset": "digits", "num_epochs": 1, **options}, "lora": section}
    try:
        check_config(document, [], datasets_lib.problems)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_tags": 2}, "base.keep_tags = 2: has an effect with shuffle_tags: true only"),
        ({"trigger_word": " "}, 'base.trigger_word = " ": must not be blank; null for none'),
        ({"mask_column": "m"}, 'base.mask_column = "m": has an effect with dataset_name and train_data_dir only'),
        ({"class_caption": "a dog"}, "has an effect with class_data_dir only"),
        ({"class_data_dir": "dogs"}, "base.class_caption = null: must be the text of the pictures in class_data_dir"),
        (
            {"class_data_dir": "dogs", "class_caption": " "},
            'base.class_caption = " ": must be the text of the pictures',
        ),
    ],
)
def test_options_that_cannot_take_effect(options, message):
    assert message in problems(**options)


def test_options_that_can():
    assert (
        problems(shuffle_tags=True, keep_tags=2, trigger_word="x", class_data_dir="dogs", class_caption="a dog") == ""
    )
