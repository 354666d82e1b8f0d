"""Data sets of the user's own: what is done for them, what they pass on, and what they may not ignore in silence."""

from __future__ import annotations

import dataclasses
import json
import re
import sys

import pytest
import torch
from repository import ROOT
from run_folders import read_metrics

import datasets_lib
from datasets_lib.example import ImageData
from datasets_lib.images.source import select_rows
from datasets_lib.own_data import OWN_TO_IT, OwnData, adapted
from train import main
from trainers.engine.config.base_options import BaseConfig
from trainers.engine.config.config import ConfigError, load_config

PAGE = (ROOT / "docs/add_a_task.md").read_text()


class Numbers:
    """The smallest data set: pictures that hold their number."""

    fingerprint = "numbers"

    def __init__(self, count=20):
        self.count = count

    def __len__(self):
        return self.count

    def get(self, index, generator):
        return {"image": torch.full((1, 8, 8), index / 100)}


class Talkative(Numbers):
    """A data set with everything that one may have."""

    random, label_names, highest_label, encoded_by, notes = False, ["a", "b"], 1, "abc", ["twenty numbers"]
    options = tuple(OWN_TO_IT)
    in_memory = True

    def name(self, index):
        return f"number {index}"

    def bucket_of(self, index):
        return index % 3

    def captions(self):
        return [f"the number {index}" for index in range(self.count)]

    def prepare(self, show_progress):
        self.prepared = show_progress

    def get(self, index, generator):
        return {**super().get(index, generator), "label": index % 2, "caption": f"the number {index}", "size": index}

    def get_batch(self, indices, generators):
        return {"number": torch.tensor(indices), "drawn": [generator is not None for generator in generators]}

    def finish(self, batch):
        return {**batch, "image": batch["number"][:, None, None, None] / 100}


def base_of(**changed):
    return BaseConfig(**{"dataset": f"{__name__}:build", "num_epochs": 1, "resolution": 8, "channels": 1, **changed})


def numbers_of(dataset):
    return [round(100 * dataset.get(index, None)["image"][0, 0, 0].item()) for index in range(len(dataset))]


def build(args, split, kind="Numbers"):
    return {"Numbers": Numbers, "Talkative": Talkative}[kind]()


# --- what is done for it


def test_it_becomes_what_the_loop_asks():
    dataset = datasets_lib.build(base_of(), "train")
    assert isinstance(dataset, ImageData)
    assert numbers_of(dataset) == list(range(20))
    assert numbers_of(dataset.only([3, 5]).only([1])) == [5]
    assert (dataset.fingerprint, dataset.name(7), dataset.first_example()["image"][0, 0, 0]) == (
        "numbers", "example 7", 0,
    )  # fmt: skip


def test_max_train_samples_takes_the_subset_that_any_data_has():
    args = base_of(max_train_samples=6)
    dataset = datasets_lib.build(args, "train")
    chosen = select_rows(20, args, "train")
    assert numbers_of(dataset) == chosen != list(range(6))
    assert numbers_of(dataset.only([0, 5])) == [chosen[0], chosen[5]]
    others = [base_of(), base_of(max_train_samples=7), base_of(max_train_samples=6, seed=1)]
    fingerprints = [datasets_lib.build(each, "train").fingerprint for each in [args, *others]]
    assert len(set(fingerprints)) == 4
    assert fingerprints[0] == datasets_lib.build(base_of(max_train_samples=6), "train").fingerprint


@pytest.mark.parametrize("count", [20, 100])
def test_a_subset_that_is_all_of_it_is_the_data_set(count):
    dataset = datasets_lib.build(base_of(max_train_samples=count), "train")
    assert (numbers_of(dataset), dataset.fingerprint) == (list(range(20)), "numbers")


def test_held_out_examples_are_its_own_choice():
    """Neither max_train_samples nor the fraction takes anything away from what build() returns."""
    args = base_of(max_train_samples=6, validation_split=0.5)
    assert numbers_of(datasets_lib.build(args, "validation")) == list(range(20))
    assert len(datasets_lib.build(args, "train")) == 6
    assert len(datasets_lib.build(base_of(validation_split=0.5), "train")) == 20


# --- what it passes on


def test_without_more_than_it_must_have_the_usual_answers_are_given():
    dataset = datasets_lib.build(base_of(caption="a number"), "train")
    for name in ("random", "label_names", "highest_label", "encoded_by", "picture_columns"):
        assert getattr(dataset, name) == getattr(ImageData, name), name
    assert (list(dataset.notes), dataset.captions(), dataset.in_memory) == ([], None, False)
    assert (dataset.bad_count, dataset.losses()) == (0, None)
    assert dataset.caption_note == "the data set has no captions: every example has base.caption = 'a number'"
    dataset.prepare(show_progress=False)
    with pytest.raises(ValueError, match=r"base.buckets = true: the data set has no bucket_of\(index\)"):
        dataset.bucket_of(0)
    for ask in (lambda: dataset.image(0, False), lambda: dataset.image_keys(0), lambda: dataset.without_image(0, None)):
        with pytest.raises(
            NotImplementedError, match=r"a OwnData has no \w+\(\); `in_memory` and `picture_columns` say"
        ):
            ask()


def test_what_it_knows_reaches_the_loop_for_the_chosen_examples():
    dataset = datasets_lib.build(base_of(max_train_samples=5, dataset_args={"kind": "Talkative"}), "train")
    chosen = dataset.rows
    for name in ("random", "label_names", "highest_label", "encoded_by", "notes"):
        assert getattr(dataset, name) == getattr(Talkative, name), name
    assert [dataset.name(index) for index in range(5)] == [f"number {row}" for row in chosen]
    assert [dataset.bucket_of(index) for index in range(5)] == [row % 3 for row in chosen]
    example = dataset.get(4, None)
    assert (example["label"], example["caption"], example["size"]) == (
        chosen[4] % 2, f"the number {chosen[4]}", chosen[4],
    )  # fmt: skip
    assert "the number 7" in dataset.captions()
    assert dataset.caption_note is None
    dataset.prepare(show_progress=True)
    assert dataset.inner.prepared
    assert dataset.in_memory
    batch = dataset.get_batch([0, 4], [None, torch.Generator()])
    assert (batch["number"].tolist(), batch["drawn"]) == ([chosen[0], chosen[4]], [False, True])
    assert torch.equal(dataset.finish(batch)["image"][1, 0, 0, 0], dataset.get(4, None)["image"][0, 0, 0])


def test_in_memory_needs_get_batch():
    class Promises(Numbers):
        in_memory = True

    assert not OwnData(Promises(), base_of(), "train").in_memory


# --- what it may not ignore in silence

SET = {
    "center_crop": True, "random_flip": True, "interpolation": "lanczos", "background_color": "black",
    "trigger_word": "sks", "shuffle_tags": True, "bad_images": "skip", "max_image_pixels": 100,
    "convert_to_srgb": False,
}  # fmt: skip


def test_the_usual_values_are_those_of_the_options():
    defaults = {field.name: field.default for field in dataclasses.fields(BaseConfig)}
    assert {name: defaults[name] for name in OWN_TO_IT} == OWN_TO_IT
    assert set(SET) == set(OWN_TO_IT)


@pytest.mark.parametrize("option", OWN_TO_IT)
def test_an_option_that_it_does_not_honour_is_an_error(option):
    args = base_of(**{option: SET[option]})
    message = (
        f"base.{option} = {SET[option]}: base.dataset={args.dataset} returned a Numbers that does not say that it "
        f'honours it; leave it out, or name it in its `options`, such as options = ("{option}",)'
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        datasets_lib.build(args, "train")
    honouring = Numbers()
    honouring.options = (option,)
    assert len(adapted(honouring, args, "train")) == 20
    another = next(name for name in OWN_TO_IT if name != option)
    honouring.options = (another,)
    with pytest.raises(ValueError, match=f"base.{option} = "):
        adapted(honouring, args, "train")


@pytest.mark.parametrize("option", ["label_column", "mask_column", "caption_column"])
def test_columns_have_names_in_folders_and_hub_data_sets_only(option, tiny_config):
    with pytest.raises(ConfigError, match=f"base.{option} = .*has an effect with dataset_name and train_data_dir only"):
        load_config(tiny_config("lora", **{f"base.{option}": "title"}))


# --- the example of docs/add_a_task.md


@pytest.fixture
def discs(tmp_path, monkeypatch):
    [source] = [text for text in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "class Discs" in text]
    (tmp_path / "discs.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    yield "discs:build"
    sys.modules.pop("discs", None)


def test_the_discs_keep_what_the_page_asks_for(discs):
    args = base_of(dataset=discs, resolution=16, channels=3, random_flip=True, validation_split=0.1)
    train_set, held_out = (datasets_lib.build(args, split) for split in ("train", "validation"))
    assert (len(train_set), len(held_out)) == (180, 20)
    assert train_set.fingerprint != held_out.fingerprint
    assert len(datasets_lib.build(base_of(dataset=discs, dataset_args={"count": 50}), "train")) == 50
    for index in (0, 5, 6, 179):
        example = train_set.get(index, None)
        datasets_lib.check_example(example, args)
        assert example["caption"] == f"a {train_set.label_names[example['label']]} disc"
    flipped = [train_set.get(3, torch.Generator().manual_seed(seed))["mask"] for seed in range(20)]
    assert len({mask.numpy().tobytes() for mask in flipped}) == 2
    assert torch.equal(flipped[7], train_set.get(3, torch.Generator().manual_seed(7))["mask"])
    assert torch.equal(held_out.get(0, torch.Generator())["mask"], held_out.get(0, None)["mask"])


def test_a_run_on_the_discs(discs, tiny_config, capsys):
    options = {"base.dataset": discs, "base.random_flip": True, "base.validation_split": 0.1}
    path = tiny_config("conditional_ddpm", **options, **{"base.dataset_args": {"count": 60}, "base.max_train_steps": 2})
    document = json.loads(path.read_text())
    assert main([str(path)]) == 0
    assert "NOTE: 54 discs, 16 pixels wide" in capsys.readouterr().out
    folder = document["base"]["output_dir"]
    assert set(read_metrics(folder, prefix="valid")[-1]) >= {"valid/loss", "valid_ema/loss"}
    state = json.loads(next((path.parent / "config").glob("checkpoint-*/state.json")).read_text())
    assert state["label_names"] == ["small", "large"]


def test_the_page_names_every_option_that_is_the_data_sets_own():
    [row] = [line for line in PAGE.splitlines() if line.startswith("| `options`")]
    assert set(re.findall(r"`(\w+)`", row)) - {"options", "base"} == set(OWN_TO_IT)
