"""Batches out of memory: each example is bit for bit what it is on its own, whatever is drawn; what is copied ahead."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bucket_pictures import BUCKETS, pictures
from image_sets import Own, encoded, memory_source, random_images
from marks import slow
from resuming import RANDOM
from run_folders import final_state, forget_after, losses

from datasets_lib.example import ImageData
from datasets_lib.images.image_dataset import ImageDataset
from datasets_lib.images.transforms import mirror, normalize, scale
from datasets_lib.own_data import OwnData
from datasets_lib.sources.class_images import PriorDataset
from trainers.engine.config.base_options import BaseConfig
from trainers.engine.data import prefetch, workers
from trainers.engine.data.batches import examples_once, first_batch, training_batches
from trainers.engine.encoders.cache import KeyedExamples
from trainers.engine.run.clock import Clock
from trainers.engine.run.signals import StopSignals

CPU = torch.device("cpu")
IMAGES = random_images(11)
ONE_SIZE = random_images(11, same_size=True)
SQUARES = [image[:17, :17] for image in IMAGES]
MASKS = [image[:, :, 0] for image in IMAGES]
TAGS = [[f"{n}, a, b, c, d", f"{n}, e, f"] if n % 3 else f"{n}, g, h, i" for n in range(11)]
BOTH = {"random_flip": True}
CASES = {
    "random crops": (IMAGES, {}, {}),
    "random crops, flips": (IMAGES, {}, BOTH),
    "random crops of one size, flips": (ONE_SIZE, {}, BOTH),
    "centre crops, flips": (IMAGES, {}, {"center_crop": True, **BOTH}),
    "centre crops": (IMAGES, {}, {"center_crop": True}),
    "flips of whole pictures": (SQUARES, {}, BOTH),
    "whole pictures": (SQUARES, {}, {}),
    "labels": (IMAGES, {"labels": list(range(11))}, BOTH),
    "masks": (IMAGES, {"masks": MASKS}, BOTH),
    "masks of whole pictures": (SQUARES, {"masks": [image[:, :, 0] for image in SQUARES]}, BOTH),
    "captions with shuffled tags": (IMAGES, {"captions": TAGS}, {"shuffle_tags": True, "keep_tags": 1, **BOTH}),
    "a caption of several": (SQUARES, {"captions": TAGS}, {"trigger_word": "sks"}),
    "gray": (IMAGES, {}, {"channels": 1, **BOTH}),
    "with transparency": (SQUARES, {"masks": [image[:, :, 0] for image in SQUARES]}, {"channels": 4, **BOTH}),
    "buckets": (pictures(11), {"labels": list(range(11))}, {**BUCKETS, **BOTH}),
    "buckets with masks": (pictures(11), {"masks": [image[:, :, 0] for image in pictures(11)]}, {**BUCKETS, **BOTH}),
    "a part of the pictures": (IMAGES, {"labels": list(range(11))}, {"max_train_samples": 7, **BOTH}),
    "broken pictures": (encoded(IMAGES, broken=[4]), {"labels": list(range(11))}, {"bad_images": "skip", **BOTH}),
    "broken pictures of one size": (encoded(ONE_SIZE, broken=[10]), {}, {"bad_images": "skip", **BOTH}),
}


@pytest.fixture
def stopping():
    with StopSignals(1800.0) as found:
        yield found


@pytest.fixture
def one_by_one(monkeypatch):
    """Examples in memory that are made by `get` after all, from then on."""
    return lambda: monkeypatch.setattr(ImageDataset, "in_memory", False)


def base_of(**changed):
    return BaseConfig(**{"resolution": 16, "train_batch_size": 4, "seed": 5, **changed})


def build(images, known, base, split="train", prepare=True):
    dataset = ImageDataset(memory_source(images, **known), base, split)
    if prepare:
        dataset.prepare(show_progress=False)
    return dataset


def batches_of(dataset, base, stopping, processes=1, process=0, steps=7):
    clock = Clock(len(dataset), base.train_batch_size, 1, processes, max_train_steps=steps)
    examples = dataset if isinstance(dataset, ImageData) else OwnData(dataset, base, "train")
    return list(training_batches(examples, clock, base, process, CPU, stopping))


def assert_same(left, right):
    """The batches have the same columns, types and bits."""
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert type(value) is type(other[name]), name
            if isinstance(value, torch.Tensor):
                assert value.dtype == other[name].dtype, name
                assert value.is_contiguous() == other[name].is_contiguous(), name
                assert torch.equal(value, other[name]), name
            else:
                assert value == other[name], name


# --- the two paths


@pytest.mark.parametrize("case", CASES)
def test_examples_are_the_same_in_batches_and_one_by_one(case, stopping, one_by_one):
    images, known, options = CASES[case]
    base = base_of(**options)
    dataset, on_demand = (build(images, known, base, prepare=prepare) for prepare in (True, False))
    assert dataset.in_memory
    assert not on_demand.in_memory
    batched = batches_of(dataset, base, stopping)
    assert_same(batched, batches_of(on_demand, base, stopping))
    clock = Clock(len(dataset), 4, 1, 1, max_train_steps=7)
    assert_same(batched[:1], [first_batch(dataset, clock, base, 0, CPU)])
    if not base.buckets:  # there the parts of a step are dealt out in the same way: tests/data/test_buckets.py
        smaller = base_of(**options, train_batch_size=2)
        halves = [batches_of(dataset, smaller, stopping, 2, process) for process in (0, 1)]
        joined = [torch.cat([one["image"], two["image"]]) for one, two in zip(*halves, strict=True)]
        assert all(torch.equal(batch["image"], image) for batch, image in zip(batched, joined, strict=True))
    one_by_one()
    assert_same(batched, batches_of(dataset, base, stopping))


@pytest.mark.parametrize("case", CASES)
def test_validation_is_the_same_too(case, stopping):
    images, known, options = CASES[case]
    base = base_of(**options)
    sets = [build(images, known, base, "validation", prepare) for prepare in (True, False)]
    found = [list(examples_once(each, range(len(each)), base, 0, 1, CPU, stopping)) for each in sets]
    assert_same([batch for batch, _ in found[0]], [batch for batch, _ in found[1]])


@pytest.mark.parametrize("own_caption", [True, False])
def test_pictures_of_a_class_are_the_same_too(stopping, own_caption):
    base = base_of(random_flip=True, class_caption="a dog", **({"shuffle_tags": True} if own_caption else {}))
    known = {"captions": TAGS} if own_caption else {"labels": list(range(11))}

    def with_prior(prepare):
        dataset = PriorDataset(build(IMAGES, known, base, prepare=False), build(ONE_SIZE[:3], {}, base, prepare=False))
        if prepare:
            dataset.prepare(show_progress=False)
        assert dataset.in_memory == prepare
        return dataset

    batched = batches_of(with_prior(True), base, stopping)
    assert_same(batched, batches_of(with_prior(False), base, stopping))
    assert {"image", "class_image", "class_caption", "class_original_size"} <= batched[0].keys()


def test_class_pictures_of_a_data_set_without_batches_come_one_by_one():
    base = base_of()
    assert not PriorDataset(OwnData(Own(3), base, "train"), build(IMAGES, {}, base)).in_memory
    assert not PriorDataset(build(IMAGES, {}, base, prepare=False), build(IMAGES, {}, base)).in_memory


def test_a_message_about_the_data_reaches_the_loop(stopping):
    base = base_of(bad_images="skip", channels=3)
    dataset = build(encoded(IMAGES[:1], broken=[0]), {}, base)
    with pytest.raises(ValueError, match="none of the 1 images of memory can be read"):
        batches_of(dataset, base, stopping)


def test_what_is_in_memory_needs_no_workers(stopping, monkeypatch):
    base = base_of(random_flip=True, dataloader_num_workers=2)
    with_workers = batches_of(build(IMAGES, {}, base, prepare=False), base, stopping)
    monkeypatch.setattr(workers, "DataLoader", None)
    assert_same(batches_of(build(IMAGES, {}, base), base, stopping), with_workers)


class Negative(ImageDataset):
    def get(self, index, generator):
        example = super().get(index, generator)
        return {**example, "image": -example["image"]}


def test_a_get_of_ones_own_is_not_passed_over(stopping):
    base = base_of(random_flip=True)
    dataset = build(IMAGES, {}, base)
    negative = Negative(memory_source(IMAGES), base, "train")
    negative.prepare(show_progress=False)
    for plain, other in zip(batches_of(dataset, base, stopping), batches_of(negative, base, stopping), strict=True):
        assert torch.equal(plain["image"], -other["image"])
    keyed = KeyedExamples(dataset, {"image": [(str(number), f"-{number}") for number in range(11)]})
    assert not keyed.in_memory
    batch = batches_of(keyed, base, stopping)[0]
    assert "image" not in batch
    assert len(batch["image_key"]) == 4


class OwnBatches(Own):
    in_memory, random = True, True

    def get_batch(self, indices, generators):
        drawn = torch.stack([torch.rand(1, generator=generator) for generator in generators])
        return {"image": torch.tensor(indices, dtype=torch.uint8), "drawn": drawn}

    def finish(self, batch):
        return {**batch, "image": batch["image"][:, None] * 2.0}


def test_batches_of_a_data_set_of_ones_own(stopping):
    class OneByOne(OwnBatches):
        in_memory = False

        def get(self, index, generator):
            return {"image": torch.tensor([index * 2.0]), "drawn": torch.rand(1, generator=generator)}

    base = base_of()
    assert_same(batches_of(OwnBatches(9), base, stopping), batches_of(OneByOne(9), base, stopping))


# --- runs


@pytest.mark.parametrize("task", ["ddpm", slow("conditional_ddpm")])
def test_a_run_is_the_same_with_and_without_the_cache(task, run_in_process):
    options = {**RANDOM, "base.validation_split": 0.02, "base.checkpointing_steps": 3}
    cached = run_in_process("cached", task, **options)
    plain = run_in_process("plain", task, **options, **{"base.image_cache_mb": 0})
    assert losses(cached) == losses(plain)
    assert final_state(cached) == final_state(plain)
    forget_after(plain, 3)
    run_in_process("plain", task, **options, **{"base.resume_from_checkpoint": "latest"})  # now with the cache
    assert losses(cached) == losses(plain)
    assert final_state(cached) == final_state(plain)


# --- pixels


def test_pixels_are_scaled_as_numbers_are():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16)
    numbers = np.arange(256, dtype=np.float32).reshape(1, 16, 16)
    assert (normalize(pixels).numpy() == numbers / np.float32(127.5) - np.float32(1)).all()
    assert (scale(pixels, 255).numpy() == numbers / np.float32(255)).all()


def test_only_flipped_ones_are_mirrored():
    pixels = torch.randint(256, (5, 3, 4, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    flipped = torch.tensor([True, False, False, True, True])
    expected = [row.flip(-1) if flip else row for row, flip in zip(pixels, flipped, strict=True)]
    assert torch.equal(mirror(pixels, flipped), torch.stack(expected))


# --- copies ahead of the step; the stream itself needs CUDA


class Recorded:
    """A CopyStream that notes what is asked of it."""

    def __init__(self):
        self.calls = []

    def begin(self, batch):
        self.calls.append(f"begin {batch['slot']}")
        if batch["slot"] == 13:
            raise RuntimeError("no memory")
        return batch, "event"

    def finished(self, batch, event):
        self.calls.append(f"finish {batch['slot']}")
        return batch


def test_the_next_copy_begins_before_a_step():
    stream = Recorded()
    batches = prefetch.copied_ahead(iter([{"slot": number} for number in range(3)]), stream)
    assert next(batches) == {"slot": 0}
    assert stream.calls == ["begin 0", "begin 1", "finish 0"]
    assert [batch["slot"] for batch in batches] == [1, 2]
    assert stream.calls[3:] == ["begin 2", "finish 1", "finish 2"]
    assert list(prefetch.copied_ahead(iter([]), stream)) == []


def failing():
    yield {"slot": 0}
    raise KeyError("bug")


@pytest.mark.parametrize(
    ("batches", "error"),
    [
        (iter([{"slot": 0}, ValueError("cat.jpg")]), ValueError),
        (failing(), KeyError),
        (iter([{"slot": 0}, {"slot": 13}]), RuntimeError),
    ],
)
def test_an_error_waits_for_its_turn(batches, error):
    copies = prefetch.copied_ahead(batches, Recorded())
    assert next(copies) == {"slot": 0}
    with pytest.raises(error):
        next(copies)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_what_is_read_is_closed(kind, monkeypatch):
    closed = []

    def reading():
        try:
            while True:
                yield {"slot": 0}
        finally:
            closed.append(True)

    monkeypatch.setattr(prefetch, "CopyStream", lambda *arguments: Recorded())
    batches = prefetch.to_device(reading(), lambda batch: batch, torch.device(kind))
    next(batches)
    batches.close()
    assert closed == [True]


class FakeStream:
    """As much of torch.cuda's stream as shows who waits for whom."""

    def __init__(self, *arguments):
        self.waited = []

    def record_event(self):
        return "copied"

    def wait_event(self, event):
        self.waited.append(event)


def test_the_current_stream_waits_for_a_copy_and_keeps_its_memory(monkeypatch):
    import contextlib

    current, recorded = FakeStream(), []
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: recorded.append(stream))
    stream = prefetch.CopyStream(lambda batch: {**batch, "image": batch["image"] + 1}, CPU)
    batch, copied = stream.begin({"image": torch.zeros(2), "caption": ["a", "b"]})
    assert current.waited == []
    assert stream.finished(batch, copied)["image"].tolist() == [1, 1]
    assert batch["caption"] == ["a", "b"]
    assert current.waited == ["copied"]
    assert recorded == [current]
