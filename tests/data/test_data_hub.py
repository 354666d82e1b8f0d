from __future__ import annotations

import io
import pickle
import re
import shutil
import socket
import time

import numpy as np
import pytest
import torch
from image_sets import assert_same, settings
from PIL import Image

import datasets_lib

datasets = pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    """A folder of parquet files with the features of MNIST: embedded PNG bytes, mode L, and ten classes."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    folder = tmp_path_factory.mktemp("mnist")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list("0123456789"))})
    for split, rows in {"train": range(40), "test": range(40, 50)}.items():
        images = [Image.fromarray(np.uint8(digits.images[row] * 15)).resize((28, 28)) for row in rows]
        data = datasets.Dataset.from_dict({"image": images, "label": digits.target[list(rows)]}, features=features)
        data.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture
def build(tmp_path):
    def build(name, split="train", **changed):
        args = settings(dataset_name=str(name), cache_dir=str(tmp_path / "cache"), **changed)
        return datasets_lib.build(args, split)

    return build


def png(value=0):
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (value,) * 3).save(file, "png")
    return {"bytes": file.getvalue(), "path": None}


def table(folder, features=None, **columns):
    """Save columns with `save_to_disk`; `image` is added unless given."""
    count = len(next(iter(columns.values()))) if columns else 3
    columns = {"image": [png(row) for row in range(count)], **columns}
    types = {"image": datasets.Image(), **(features or {})}
    data = datasets.Dataset.from_dict(columns)
    for name, feature in types.items():
        data = data.cast_column(name, feature)
    data.save_to_disk(folder)
    return folder


# --- the layouts


@pytest.mark.parametrize("channels", [1, 3])
def test_parquet_with_the_features_of_mnist(mnist, build, channels):
    from sklearn.datasets import load_digits

    dataset = build(mnist, channels=channels, resolution=28)
    assert len(dataset) == 40
    assert dataset.label_names == list("0123456789")
    assert dataset.caption_note is not None
    for index in (0, 39):
        example = dataset.get(index, None)
        datasets_lib.check_example(example, settings(channels=channels, resolution=28))
        digit = Image.fromarray(np.uint8(load_digits().images[index] * 15)).resize((28, 28))
        assert np.abs(example["image"].numpy() - (np.asarray(digit) / 127.5 - 1)).max() < 1e-6
        assert example["label"] == load_digits().target[index]


def test_splits(mnist, build):
    validation = build(mnist, "validation", validation_split="test")
    assert len(validation) == 10
    assert len({validation.fingerprint, build(mnist).fingerprint}) == 2
    assert [len(build(mnist, split, validation_split=0.25)) for split in ("train", "validation")] == [30, 10]
    with pytest.raises(
        ValueError, match=r"base.validation_split of .* is 'tset'; .*one of: train, test; did you mean 'test'"
    ):
        build(mnist, "validation", validation_split="tset")


def test_a_training_split_must_exist(mnist, build, tmp_path):
    shutil.copy(mnist / "test-00000-of-00001.parquet", tmp_path / "test-00000-of-00001.parquet")
    with pytest.raises(ValueError, match=r"the training split of .* is 'train'; it must be one of: test"):
        build(tmp_path)


def test_cached_and_pickled_rows_are_the_same(mnist, build):
    plain, cached = build(mnist, random_flip=True), build(mnist, random_flip=True)
    cached.prepare()
    copy = pickle.loads(pickle.dumps(plain))
    for index in (3, 30):
        first, second, third = (each.get(index, torch.Generator().manual_seed(1)) for each in (plain, cached, copy))
        assert torch.equal(first["image"], third["image"])
        assert_same(first, second)


def test_the_fingerprint_does_not_depend_on_place_or_cache(mnist, build, tmp_path):
    shutil.copytree(mnist, tmp_path / "copy")
    datasets.load_dataset(str(mnist), split="train", cache_dir=str(tmp_path / "c")).save_to_disk(tmp_path / "disk")
    assert len({build(folder).fingerprint for folder in (mnist, tmp_path / "copy", tmp_path / "disk")}) == 1


def test_the_fingerprint_depends_on_images_labels_and_captions(build, tmp_path):
    known = {"a": {"label": [0, 1]}, "b": {"label": [1, 0]}, "c": {"text": ["x", "y"]}, "d": {"text": ["x", "z"]}}
    known["e"] = {"image": [png(9), png(1)], "text": ["x", "y"]}
    prints = {
        name: build(table(tmp_path / name, **columns), label_column="label" if "label" in columns else None).fingerprint
        for name, columns in known.items()
    }
    assert len(set(prints.values())) == 5


def test_a_folder_saved_with_several_splits(build, tmp_path):
    data = datasets.load_from_disk(table(tmp_path / "one"))
    datasets.DatasetDict(train=data, valid=data.select([2])).save_to_disk(tmp_path / "both")
    assert len(build(tmp_path / "both")) == 3
    held_out = build(tmp_path / "both", "validation", validation_split="valid")
    assert round(float(held_out.get(0, None)["image"].mean() + 1) * 127.5) == 2


def test_an_image_folder_with_captions(build, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.png").write_bytes(png(7)["bytes"])
    (tmp_path / "data" / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "seven"}')
    dataset = build(tmp_path / "data")
    example = dataset.get(0, None)
    assert dataset.caption_note is None
    assert example["caption"] == "seven"
    assert round(float(example["image"].mean() + 1) * 127.5) == 7


def test_a_link_out_of_an_image_folder_is_refused(build, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "secret.png").write_bytes(png()["bytes"])
    (tmp_path / "data" / "a.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(
        ValueError, match=r"a\.png leads out of .*data, as a link or through one; copy it into the folder"
    ):
        build(tmp_path / "data").get(0, None)


# --- columns


def test_columns_by_name(build, tmp_path):
    folder = table(
        tmp_path / "t",
        {"other": datasets.Image()},
        other=[png(200), png(201)],
        kind=[4, 5],
        text=["x", "y"],
        title=[["a", "b"], ["c"]],
    )
    dataset = build(folder, image_column="other", label_column="kind", caption_column="title")
    example = dataset.get(1, None)
    assert round(float(example["image"].mean() + 1) * 127.5) == 201
    assert (example["label"], example["caption"], dataset.label_names) == (5, "c", None)


@pytest.mark.parametrize("option", ["image_column", "label_column", "caption_column"])
def test_a_column_that_is_not_there(build, tmp_path, option):
    folder = table(tmp_path / "t", label=[0], text=["x"])
    with pytest.raises(ValueError, match=rf"base.{option} is 'labell'; it must be one of: .*did you mean 'label'"):
        build(folder, **{option: "labell"})


def test_images_are_found_by_type_only_if_there_is_one_column(build, tmp_path):
    two = table(tmp_path / "two", {"second": datasets.Image()}, second=[png()])
    with pytest.raises(ValueError, match=r"2 columns of type Image among image, second; name one in base.image_column"):
        build(two)
    none = tmp_path / "none"
    datasets.Dataset.from_dict({"x": [1]}).save_to_disk(none)
    with pytest.raises(ValueError, match=r"0 columns of type Image among x"):
        build(none)
    with pytest.raises(ValueError, match=r"base.image_column is 'x', whose .*int64.* values are not images"):
        build(none, image_column="x")


def test_several_class_labels_are_left_to_choose(build, tmp_path):
    classes = datasets.ClassLabel(names=["a", "b"])
    folder = table(tmp_path / "t", {"fine": classes, "coarse": classes}, fine=[0, 1], coarse=[1, 0])
    dataset = build(folder)
    assert "label" not in dataset.get(0, None)
    assert "fine, coarse" in dataset.notes[0]
    chosen = build(folder, label_column="coarse")
    assert (chosen.get(0, None)["label"], chosen.label_names, chosen.notes) == (1, ["a", "b"], [])


@pytest.mark.parametrize("labels", [[0, None], [0, -1], ["cat", "dog"], [0.5, 1.0]])
def test_labels_must_be_integers(build, tmp_path, labels):
    with pytest.raises(
        ValueError, match=r"column 'label' has .* in row [01]; labels are integers .*class_encode_column"
    ):
        build(table(tmp_path / "t", label=labels), label_column="label")


@pytest.mark.parametrize("texts", [["a", None], ["a", " "]])
def test_a_missing_caption_names_its_row(build, tmp_path, texts):
    with pytest.raises(ValueError, match=r"row 1 of .*t, column 'text' \(base.caption_column\), has no caption"):
        build(table(tmp_path / "t", text=texts))


def test_a_missing_image_is_a_broken_image(build, tmp_path):
    folder = table(tmp_path / "t", image=[png(1), None])
    with pytest.raises(ValueError, match=r"cannot use image row 1 of .*: it is empty .*base.bad_images=skip"):
        build(folder).get(1, None)
    assert build(folder, bad_images="skip").get(1, None)["image"].mean() == pytest.approx(1 / 127.5 - 1)


def test_no_rows(build, mnist, tmp_path):
    data = datasets.load_dataset(str(mnist), split="train", cache_dir=str(tmp_path / "cache"))
    (tmp_path / "empty").mkdir()
    data.select([]).to_parquet(tmp_path / "empty" / "train.parquet")
    with pytest.raises(ValueError, match=r"cannot be loaded .*no data"):
        build(tmp_path / "empty")


# --- what cannot be had


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("name", ["nobody/nothing", "nothing", "no/such/folder"])
def test_what_cannot_be_had_is_one_quick_error(no_network, build, name):
    start = time.monotonic()
    message = (
        f"base.dataset_name={name} cannot be loaded .*/{name}.*base.dataset_name=FOLDER .*base.train_data_dir=FOLDER"
    )
    with pytest.raises(FileNotFoundError, match=message):
        build(name)
    assert time.monotonic() - start < 10
    assert not datasets.config.HF_HUB_OFFLINE


def test_without_a_network_the_cache_is_used(no_network, mnist, build, tmp_path):
    cache = tmp_path / "cache"
    datasets.load_dataset(str(mnist), cache_dir=str(cache))
    (info,) = cache.rglob("dataset_info.json")
    shutil.copytree(info.parent, cache / "nobody___digits" / "default" / "0.0.0" / "a1b2")
    for written in (cache / "nobody___digits").rglob("*.arrow"):
        written.rename(written.with_name(re.sub(r"^.*?-", "digits-", written.name)))
    copied = cache / "nobody___digits" / "default" / "0.0.0" / "a1b2" / "dataset_info.json"
    copied.write_text(re.sub(r'"config_name": "[^"]*"', '"config_name": "default"', copied.read_text()))
    assert len(build("nobody/digits")) == 40


def test_a_folder_that_datasets_cannot_load(build, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.parquet").write_text("not parquet")
    with pytest.raises(ValueError, match=r"data.train.parquet: cannot be read as parquet \(.*\); replace it"):
        build(tmp_path / "data")


def test_a_configuration_that_is_not_there(mnist, build):
    with pytest.raises(ValueError, match=r"cannot be loaded \(ValueError: .*'nope'"):
        build(mnist, dataset_config_name="nope")
