from __future__ import annotations

import ast
import io
import pickle
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest
import torch
from image_sets import Own, assert_same, encoded, image_dataset, random_images, seeded, settings
from PIL import ExifTags, Image

import datasets_lib
from datasets_lib.images.decode import ImageReader
from datasets_lib.images.source import select_rows
from datasets_lib.sources import digits


def build_with_a_method(args, split):
    own = Own(3)
    own.fingerprint = lambda: "own"
    return own


def build_a_list(args, split):
    return [1, 2]


# --- choosing a data set


def test_digits_have_the_values_of_scikit_learn():
    from sklearn.datasets import load_digits

    dataset = datasets_lib.build(settings(dataset="digits", resolution=8, channels=1), "train")
    known = load_digits()
    assert len(dataset) == 1797
    assert dataset.label_names == list("0123456789")
    assert dataset.caption_note is not None
    for index in (0, 1000, 1796):
        example = dataset.get(index, None)
        expected = np.rint(known.images[index] * 255 / 16) / 127.5 - 1
        assert np.abs(example["image"][0].numpy() - expected).max() < 1e-6
        assert example["label"] == known.target[index]
        assert example["caption"] == ""


@pytest.mark.parametrize("listed", [None, [], PackageNotFoundError("scikit-learn")])
def test_digits_are_the_same_where_the_librarys_file_is_not_found(listed, monkeypatch):
    def files(name):
        if isinstance(listed, Exception):
            raise listed
        return listed

    here = digits.read_digits()
    digits.read_digits.cache_clear()  # see conftest.py
    monkeypatch.setattr(digits, "files", files)
    there = digits.read_digits()
    digits.read_digits.cache_clear()
    assert (here[0] == there[0]).all()
    assert here[1] == there[1]


@pytest.mark.parametrize(("resolution", "channels"), [(8, 4), (32, 3), (60, 1)])
def test_digits_of_any_size_pass_the_contract(resolution, channels):
    args = settings(dataset="digits", resolution=resolution, channels=channels, caption="a digit")
    dataset = datasets_lib.build(args, "train")
    example = dataset.get(5, seeded(0))
    datasets_lib.check_example(example, args)
    assert example["caption"] == "a digit"


def test_digits_have_no_named_split():
    with pytest.raises(
        ValueError, match=r"base.validation_split is 'test', but base.dataset=digits has no named splits; give a frac"
    ):
        datasets_lib.build(settings(dataset="digits", validation_split="test"), "train")


def test_there_is_no_validation_set_without_validation_split():
    assert datasets_lib.build(settings(dataset="digits"), "validation") is None


def test_a_data_set_of_ones_own():
    name = "image_sets:build_for_test"
    assert len(datasets_lib.build(settings(dataset=name), "train")) == 3
    assert len(datasets_lib.build(settings(dataset=name, dataset_args={"size": 5}), "train")) == 5
    datasets_lib.prepare(datasets_lib.build(settings(dataset=name), "train"), show_progress=False)
    with pytest.raises(
        ValueError, match=r"build_a_list returned a list without get, fingerprint; a data set has __len__"
    ):
        datasets_lib.build(settings(dataset=f"{__name__}:build_a_list"), "train")
    with pytest.raises(ValueError, match=r"returned a Own without a fingerprint that is text"):
        datasets_lib.build(settings(dataset=f"{__name__}:build_with_a_method"), "train")
    with pytest.raises(ValueError, match=r"base.dataset_args is {'sise': 5}.*does not take.*its arguments: size"):
        datasets_lib.build(settings(dataset=name, dataset_args={"sise": 5}), "train")
    with pytest.raises(ValueError, match=r"base.dataset_args is .*its arguments: none"):
        datasets_lib.build(settings(dataset="digits", dataset_args={"size": 5}), "train")


def test_unknown_data_sets_and_splits():
    with pytest.raises(
        ValueError, match=r"base.dataset is 'digit'; it must be one of: digits, package.module:build; did"
    ):
        datasets_lib.build(settings(dataset="digit"), "train")
    for name in ("no_such_package:build", f"{__name__}:no_such_function"):
        with pytest.raises(ValueError, match=rf"base.dataset is '{name}', which cannot be imported .*PYTHONPATH"):
            datasets_lib.build(settings(dataset=name), "train")
    with pytest.raises(ValueError, match=r"split is 'test'; it must be one of: train, validation"):
        datasets_lib.build(settings(dataset="digits"), "test")


# --- splits


def test_a_fraction_splits_into_disjoint_sets_that_are_everything():
    args = settings(validation_split=0.2)
    train, held_out = (select_rows(101, args, split) for split in ("train", "validation"))
    assert len(held_out) == 20
    assert sorted(train + held_out) == list(range(101))
    assert select_rows(101, args, "train") == train
    assert select_rows(101, settings(validation_split=0.2, seed=1), "train") != train


def test_max_train_samples_takes_a_part_of_the_training_set_only():
    fewer, more = (
        [
            select_rows(100, settings(validation_split=0.2, max_train_samples=count), split)
            for split in ("train", "validation")
        ]
        for count in (10, 30)
    )
    assert (len(fewer[0]), len(more[0])) == (10, 30)
    assert set(fewer[0]) < set(more[0])
    assert fewer[1] == more[1] == select_rows(100, settings(validation_split=0.2), "validation")
    assert fewer[0] != list(range(10)), "the first rows of sorted data are all of one class"
    assert select_rows(5, settings(max_train_samples=10), "train") == list(range(5))


def test_a_named_validation_split_keeps_every_row():
    assert select_rows(5, settings(validation_split="test", max_train_samples=2), "validation") == list(range(5))


@pytest.mark.parametrize("fraction", [0.0, 1.0, 1, -0.5, 0.9])
def test_fractions_that_leave_nothing(fraction):
    with pytest.raises(
        ValueError, match=rf"base.validation_split is {fraction} of 2 images; give a .*fraction between 0"
    ):
        select_rows(2, settings(validation_split=fraction), "train")


def test_fingerprints_tell_the_data_apart_but_not_the_transforms():
    def fingerprint(split="train", **changed):
        return datasets_lib.build(settings(dataset="digits", **changed), split).fingerprint

    assert fingerprint() == fingerprint(resolution=8, channels=1, random_flip=True, center_crop=True)
    halves = {"validation_split": 0.5}
    several = [
        fingerprint(),
        fingerprint(max_train_samples=9),
        fingerprint(**halves),
        fingerprint("validation", **halves),
    ]
    assert len(set(several)) == 4
    assert image_dataset(random_images(2)).fingerprint != image_dataset(random_images(2), "validation").fingerprint


def test_an_empty_data_set_is_refused():
    with pytest.raises(ValueError, match=r"the train set of memory has no images; check the data set"):
        image_dataset([])


# --- transforms


def test_the_same_generator_gives_the_same_example_and_another_does_not():
    dataset = image_dataset(random_images(1), random_flip=True)
    assert dataset.random
    assert_same(dataset.get(0, seeded(7)), dataset.get(0, seeded(7)))
    assert len({dataset.get(0, seeded(seed))["image"].numpy().tobytes() for seed in range(20)}) > 5


def test_get_leaves_global_random_states_alone():
    dataset = image_dataset(random_images(2), random_flip=True, known={"captions": [["a", "b"], ["c", "d"]]})
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    dataset.get(0, seeded(0))
    dataset.get(1, None)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()


def test_without_a_generator_the_centre_is_cut_out():
    image = np.zeros((16, 32), dtype=np.uint8)
    image[:, 8:24] = np.arange(16)
    dataset = image_dataset([image], channels=1, random_flip=True)
    assert torch.equal(dataset.get(0, None)["image"][0, 0], torch.arange(16) / 127.5 - 1)


def test_random_crops_and_flips_cover_everything():
    image = np.tile(np.arange(20, dtype=np.uint8), (16, 1))
    dataset = image_dataset([image], channels=1, random_flip=True)
    rows = [dataset.get(0, seeded(seed))["image"][0, 0] for seed in range(200)]
    ends = {(round(float(row[0] + 1) * 127.5), round(float(row[-1] + 1) * 127.5)) for row in rows}
    crops = {(left, left + 15) for left in range(5)}
    assert ends == crops | {(right, left) for left, right in crops}


def test_validation_and_center_crop_use_no_generator():
    images = random_images(1)
    for dataset in (image_dataset(images, "validation", random_flip=True), image_dataset(images, center_crop=True)):
        assert not dataset.random
        for seed in range(10):
            assert_same(dataset.get(0, seeded(seed)), dataset.get(0, None))


def test_one_of_several_captions_is_drawn():
    known = {"captions": [["a", "b", "c"], "d"]}
    dataset = image_dataset(random_images(2), known=known, center_crop=True)
    assert dataset.caption_note is None
    assert dataset.random
    assert {dataset.get(0, seeded(seed))["caption"] for seed in range(30)} == {"a", "b", "c"}
    assert dataset.get(0, None)["caption"] == "a"
    assert dataset.get(1, seeded(0))["caption"] == "d"


# --- the cache


@pytest.mark.parametrize("same_size", [True, False])
@pytest.mark.parametrize("known", [{}, {"labels": list(range(6)), "captions": [["a", "b"]] * 6}])
@pytest.mark.parametrize(("split", "random_flip"), [("train", True), ("train", False), ("validation", True)])
def test_cached_examples_are_the_same_bits(same_size, known, split, random_flip):
    images = random_images(6, same_size)
    plain, cached = (image_dataset(images, split, known, random_flip=random_flip) for _ in range(2))
    cached.prepare()
    assert (cached.pictures.decoded.shape is not None) == same_size
    for index in range(6):
        assert_same(plain.get(index, seeded(index)), cached.get(index, seeded(index)))
        assert_same(plain.get(index, None), cached.get(index, None))


def test_reading_from_the_cache_does_not_change_it():
    dataset = image_dataset(random_images(2), random_flip=True)
    dataset.prepare()
    dataset.get(0, None)["image"].zero_()
    assert_same(dataset.get(0, None), image_dataset(random_images(2)).get(0, None))


def test_prepare_finds_that_square_images_need_no_random_crop():
    dataset = datasets_lib.build(settings(dataset="digits", max_train_samples=5), "train")
    before = dataset.get(3, seeded(0))
    dataset.prepare()
    assert not dataset.random
    assert_same(before, dataset.get(3, None))


@pytest.mark.parametrize(("side", "count", "fits"), [(512, 1, True), (512, 2, False)])
def test_the_cache_is_used_only_if_everything_fits(side, count, fits):
    # 512 x 512 in four channels is one MiB.
    images = [np.zeros((side, side, 4), dtype=np.uint8)] * count
    dataset = image_dataset(images, resolution=512, channels=4, image_cache_mb=1)
    dataset.prepare()
    assert (dataset.pictures.decoded is not None) == fits


def test_the_cache_counts_the_long_side_too():
    dataset = image_dataset([np.zeros((512, 520, 4), dtype=np.uint8)], resolution=512, channels=4, image_cache_mb=1)
    dataset.prepare()
    assert dataset.pictures.decoded is None


def test_a_cache_of_zero_is_off():
    dataset = image_dataset(random_images(1), image_cache_mb=0)
    dataset.prepare()
    assert dataset.pictures.decoded is None


@pytest.mark.parametrize("prepared", [True, False])
def test_a_pickled_data_set_gives_the_same_examples(prepared):
    dataset = image_dataset(random_images(3), random_flip=True, bad_images="skip")
    if prepared:
        dataset.prepare()
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.fingerprint == dataset.fingerprint
    assert_same(copy.get(2, seeded(3)), dataset.get(2, seeded(3)))


# --- sizes, crops and what a cache of encoded pictures asks for


def grid(height, width, turned=1):
    """An image file whose pixels tell where they are: red counts rows, green columns of the upright picture."""
    rows, columns = np.mgrid[:height, :width].astype(np.uint8)
    upright = Image.fromarray(np.stack([rows, columns, 0 * rows], axis=2))
    back = {1: None, 6: Image.Transpose.ROTATE_90, 5: Image.Transpose.TRANSPOSE}[turned]
    stored = upright if back is None else upright.transpose(back)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = turned
    file = io.BytesIO()
    stored.save(file, "png", exif=exif)
    return file.getvalue()


@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize("kind", ["bytes", "turned", "array"])
def test_the_crop_says_where_each_pixel_was(prepared, kind):
    image = {
        "bytes": grid(16, 21),
        "turned": grid(16, 21, turned=6),
        "array": np.asarray(Image.open(io.BytesIO(grid(16, 21)))),
    }[kind]
    dataset = image_dataset([image], random_flip=True)
    if prepared:
        dataset.prepare()
    seen = set()
    for seed in range(60):
        example = dataset.get(0, seeded(seed))
        assert example["original_size"].tolist() == [16, 21]
        columns = ((example["image"][1, 0] + 1) * 127.5).round().long()
        flipped = bool(columns[0] > columns[1])
        top, left = example["crop_top_left"].tolist()
        expected = 20 - columns[0] if flipped else columns[0]  # in the mirrored picture column c is 20 - c
        assert (top, left) == (0, expected)
        seen.add((flipped, left))
    assert len(seen) == 12
    assert dataset.get(0, None)["crop_top_left"].tolist() == [0, 2]


def test_the_original_size_is_that_before_resizing():
    dataset = image_dataset([np.zeros((40, 100, 3), dtype=np.uint8)])
    example = dataset.get(0, None)
    assert (example["original_size"].tolist(), example["crop_top_left"].tolist()) == ([40, 100], [0, 12])
    assert example["original_size"].dtype == example["crop_top_left"].dtype == torch.int64


def several_kinds():
    return [*random_images(3), *encoded(random_images(2)), grid(20, 30, turned=5), grid(30, 20, turned=6)]


@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize("random_flip", [True, False])
def test_an_example_without_its_image_agrees_with_the_whole_one(prepared, random_flip, monkeypatch):
    known = {"captions": [["a", "b", "c"]] * 7, "labels": list(range(7))}
    dataset = image_dataset(several_kinds(), known=known, center_crop=True, random_flip=random_flip)
    if prepared:
        dataset.prepare()
    keys = [(index, seed) for index in range(7) for seed in (None, 1, 2, 3, 4)]
    whole = [dataset.get(index, None if seed is None else seeded(seed)) for index, seed in keys]
    images = [example.pop("image") for example in whole]
    with monkeypatch.context() as patch:
        patch.setattr(ImageReader, "read", None)  # nothing is decoded
        without = [dataset.without_image(index, None if seed is None else seeded(seed)) for index, seed in keys]
    flips = [example.pop("flipped") for example in without]
    for (index, _), left, right, image, flipped in zip(keys, whole, without, images, flips, strict=True):
        assert_same(left, right)
        assert torch.equal(image, dataset.image(index, flipped))
    assert set(flips) == ({True, False} if random_flip else {False})


def test_without_an_image_random_crops_are_the_same_too():
    dataset = image_dataset(several_kinds(), random_flip=True)
    for index in range(7):
        whole, without = dataset.get(index, seeded(index)), dataset.without_image(index, seeded(index))
        without.pop("flipped"), whole.pop("image")
        assert_same(whole, without)


def test_keys_tell_pictures_apart_by_content_and_by_what_makes_their_pixels():
    images = encoded(random_images(2))
    plain = image_dataset(images).image_keys(0)
    assert len(plain) == 1
    assert len(plain[0]) == 64
    both = image_dataset(images, random_flip=True).image_keys(0)
    assert both[0] == plain[0]
    assert len(set(both)) == 2
    assert image_dataset(images, "validation", random_flip=True).image_keys(0) == plain
    same = [image_dataset(images[::-1], center_crop=True, max_image_pixels=5000, caption="x").image_keys(1)]
    same += [image_dataset([images[0]], image_cache_mb=0, bad_images="skip").image_keys(0)]
    assert same == [plain, plain]
    changes = {"resolution": 8, "channels": 1, "interpolation": "nearest", "background_color": "black"}
    others = [image_dataset(images, **{option: value}).image_keys(0) for option, value in changes.items()]
    others += [image_dataset(images).image_keys(1), image_dataset(random_images(1)).image_keys(0)]
    assert len({plain, *others}) == 7


def test_keys_of_arrays_see_shape_and_type():
    arrays = [np.zeros((16, 32), dtype=np.uint8), np.zeros((32, 16), dtype=np.uint8), np.zeros((16, 32, 1), np.uint8)]
    keys = [image_dataset([array]).image_keys(0) for array in arrays]
    assert len(set(keys)) == 3
    assert image_dataset([arrays[0].copy()]).image_keys(0) == keys[0]


def test_a_key_is_remembered_and_the_file_is_named_where_it_cannot_be_read(tmp_path):
    Image.fromarray(random_images(1)[0]).save(tmp_path / "a.png")
    dataset = image_dataset([tmp_path / "a.png", tmp_path / "b.png"])
    before = dataset.image_keys(0)
    (tmp_path / "a.png").unlink()
    assert dataset.image_keys(0) == pickle.loads(pickle.dumps(dataset)).image_keys(0) == before
    with pytest.raises(ValueError, match=r"cannot use image .*b\.png: .*[Nn]o such file"):
        dataset.image_keys(1)
    with pytest.raises(ValueError, match=r"cannot use image .*b\.png: .*[Nn]o such file"):
        dataset.without_image(1, None)


def ask(dataset, queue):
    queue.put((dataset.image_keys(0), dataset.without_image(0, seeded(1))["flipped"]))


def test_a_spawned_worker_gives_the_same_keys():
    dataset = image_dataset(encoded(random_images(1)), random_flip=True, center_crop=True)
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    worker = context.Process(target=ask, args=(dataset, queue))
    worker.start()
    assert queue.get() == (dataset.image_keys(0), dataset.without_image(0, seeded(1))["flipped"])
    worker.join(30)


@pytest.mark.parametrize("prepared", [True, False])
def test_a_replaced_picture_has_the_key_and_the_columns_of_the_one_instead_of_it(prepared):
    files = [*encoded(random_images(19)), b""]
    files[4] = files[4][: len(files[4]) // 2]  # the header is whole
    known = {"labels": list(range(20)), "captions": [str(number) for number in range(20)]}
    dataset = image_dataset(files, bad_images="skip", center_crop=True, known=known)
    if prepared:
        dataset.prepare()
    assert [dataset.without_image(index, None)["label"] for index in (3, 4, 19)] == [3, 5, 0]
    assert dataset.image_keys(4) == dataset.image_keys(5)
    assert torch.equal(dataset.image(4, False), dataset.get(5, None)["image"])
    assert dataset.bad_count == 2


def test_all_captions_of_a_split():
    known = {"captions": [["a", "b"], "c", "d"]}
    assert list(image_dataset(random_images(3), known=known).captions()) == ["a", "b", "c", "d"]
    halves = [
        list(image_dataset(random_images(3), split, known, validation_split=0.34).captions())
        for split in ("train", "validation")
    ]
    assert sorted(halves[0] + halves[1]) == ["a", "b", "c", "d"]
    assert list(image_dataset(random_images(2), caption="x").captions()) == ["x", "x"]


def test_fingerprints_of_earlier_versions_hold():
    """Checkpoints refuse another fingerprint: these are of version 0.1.0."""
    assert datasets_lib.build(settings(dataset="digits"), "train").fingerprint == "fc31403845377508"
    held_out = datasets_lib.build(settings(dataset="digits", validation_split=0.1), "validation")
    assert held_out.fingerprint == "de1ceff38db66463"


# --- broken images


def test_a_broken_image_is_an_error_that_names_it():
    for prepare in (True, False):
        dataset = image_dataset(encoded(random_images(3), broken=[1]))
        dataset.get(0, None)
        with pytest.raises(ValueError, match=r"cannot use image row 1 of memory: .*or set base.bad_images=skip"):
            dataset.prepare() if prepare else dataset.get(1, None)


@pytest.mark.parametrize("same_size", [True, False])
@pytest.mark.parametrize("prepare", [True, False])
def test_broken_images_are_replaced_by_the_next_good_one(prepare, same_size):
    files = encoded(random_images(20, same_size), broken=[7, 19])
    dataset = image_dataset(files, bad_images="skip", random_flip=True, known={"labels": list(range(20))})
    if prepare:
        dataset.prepare()
    for _ in range(2):
        assert_same(dataset.get(7, seeded(1)), dataset.get(8, seeded(1)))
        assert_same(dataset.get(19, seeded(1)), dataset.get(0, seeded(1)))
    assert dataset.get(7, None)["label"] == 8
    assert dataset.bad_count == 2


@pytest.mark.parametrize("prepare", [True, False])
def test_skipping_is_capped(prepare):
    dataset = image_dataset(encoded(random_images(20), broken=[3, 4, 5]), bad_images="skip")
    with pytest.raises(
        ValueError, match=r"3 of 20 images cannot be read, .*replaces 10 % at most; .*row [345] of memory"
    ):
        dataset.prepare() if prepare else dataset.get(3, None)


@pytest.mark.parametrize("prepare", [True, False])
def test_a_single_broken_image_ends_too(prepare):
    dataset = image_dataset(encoded(random_images(1), broken=[0]), bad_images="skip")
    if prepare:
        dataset.prepare()
    with pytest.raises(ValueError, match=r"none of the 1 images of memory can be read"):
        dataset.get(0, None)


def test_worker_processes_count_broken_images_together():
    dataset = image_dataset(encoded(random_images(20), broken=[2, 3]), bad_images="skip")
    context = torch.multiprocessing.get_context("fork")
    worker = context.Process(target=dataset.get, args=(2, None))
    worker.start()
    worker.join(30)
    assert worker.exitcode == 0
    assert dataset.bad_count == 2


# --- the example contract


GOOD = {"image": torch.zeros(3, 16, 16), "label": 0, "caption": ""}


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ([], "must be a dict with the key 'image', or 'mean' and 'logvar' of latents, got list"),
        ({"images": 0}, r"the key 'image', or 'mean' and 'logvar' of latents, got \['images'\]"),
        ({**GOOD, "image": np.zeros((3, 16, 16))}, "must be a float32 tensor, got float64"),
        ({**GOOD, "image": torch.zeros(3, 16, 16).double()}, "must be a float32 tensor, got torch.float64"),
        ({**GOOD, "image": torch.zeros(16, 16, 3)}, r"shape \[16, 16, 3\], expected \[3, 16, 16\] from base.channels"),
        ({**GOOD, "image": torch.full((3, 16, 16), torch.nan)}, "NaN or infinity; every value must be finite"),
        ({**GOOD, "image": torch.full((3, 16, 16), 255.0)}, r"values from 255 to 255, expected \[-1, 1\]"),
        ({**GOOD, "label": -1}, r"label must be an int of at least 0, got -1 \(int\)"),
        ({**GOOD, "label": "cat"}, r"label must be an int of at least 0, got 'cat' \(str\)"),
        ({**GOOD, "caption": None}, r"caption must be a str, got None \(NoneType\)"),
        ({**GOOD, "class_caption": 3}, r"class_caption must be a str, got 3 \(int\)"),
        (
            {**GOOD, "class_image": torch.zeros(1, 16, 16)},
            r"class_image has shape \[1, 16, 16\], expected \[3, 16, 16\]",
        ),
        (
            {**GOOD, "mask": torch.zeros(3, 16, 16)},
            r"mask has shape \[3, 16, 16\], expected \[1, 16, 16\] from 1, base.res",
        ),
        ({**GOOD, "mask": torch.full((1, 16, 16), -1.0)}, r"mask has values from -1 to -1, expected \[0, 1\]: x / 255"),
        ({**GOOD, "mask": torch.zeros(1, 16, 16).int()}, "mask must be a float32 tensor, got torch.int32"),
        (
            {**GOOD, "original_size": torch.tensor([0, 3])},
            r"original_size must be an int64 tensor of 2 numbers of at least 1",
        ),
        ({**GOOD, "original_size": (3, 3)}, r"original_size must be .*, vertical and horizontal, got \(3, 3\)"),
        (
            {**GOOD, "crop_top_left": torch.tensor([0.0, 3.0])},
            r"crop_top_left must be an int64 tensor of 2 numbers of at least 0",
        ),
        ({**GOOD, "class_crop_top_left": torch.tensor([0])}, r"class_crop_top_left must be an int64 tensor"),
    ],
)
def test_what_is_wrong_with_an_example_is_said(example, message):
    with pytest.raises(ValueError, match=message):
        datasets_lib.check_example(example, settings())


def test_a_good_example_passes():
    datasets_lib.check_example(GOOD, settings())
    datasets_lib.check_example({"image": torch.ones(3, 16, 16)}, settings())
    pairs = {"original_size": torch.tensor([1, 5]), "crop_top_left": torch.tensor([0, 3])}
    more = {"mask": torch.ones(1, 16, 16), "class_image": -torch.ones(3, 16, 16), "class_caption": "x"}
    datasets_lib.check_example({**GOOD, **pairs, **more}, settings())


# --- imports


def test_datasets_lib_imports_nothing_of_the_trainers():
    files = list(Path(datasets_lib.__file__).parent.rglob("*.py"))
    assert len(files) > 5
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {"trainers", "train", "scripts"}, file


def test_importing_datasets_lib_loads_no_heavy_library():
    heavy = "{'datasets', 'sklearn', 'torchvision'}"
    code = f"import datasets_lib, datasets_lib.sources.folder, datasets_lib.sources.hub, sys; print({heavy} & set(sys.modules))"
    root = Path(datasets_lib.__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
