"""Aspect-ratio buckets: the least is cropped away, batches have one size, every example comes once per epoch."""

from __future__ import annotations

import io
import itertools
import json
import re
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from bucket_pictures import BUCKETS, SIZES, pictures
from image_sets import assert_same, image_dataset, seeded, settings
from marks import slow
from PIL import Image
from processes import launch
from reports import section
from run_folders import final_state, forget_after, losses, read_metrics

import datasets_lib
from datasets_lib.example import ImageData
from datasets_lib.images.buckets import best, bucket_sizes, kept_part
from scripts.inspect_data import sheet_of
from trainers.engine.checkpoint.config_diff import check_steps
from trainers.engine.config.base_options import BaseConfig
from trainers.engine.config.config import check_config
from trainers.engine.config.files import ConfigError
from trainers.engine.data.batches import BucketOrder, SlotBatches, by_bucket, examples_once, order_of
from trainers.engine.run.clock import Clock
from trainers.engine.run.signals import StopSignals

CPU = torch.device("cpu")
OF_SIZES = [0, 1, 2, 0, 2]


def encoded(picture, kind="PNG", **options):
    file = io.BytesIO()
    Image.fromarray(picture).save(file, kind, **options)
    return file.getvalue()


# --- sizes


def all_sizes(max_pixels, step):
    """Every size that is allowed, by trying all."""
    sides = range(step, 2 * max_pixels + 1, step)
    return {(h, w) for h in sides for w in sides if h * w <= max_pixels and h <= 2 * w and w <= 2 * h}


@pytest.mark.parametrize(
    ("max_pixels", "step"), [(16**2, 4), (32**2, 8), (10, 1), (14, 2), (100, 7), (80, 4), (50, 7), (300, 5)]
)
def test_sizes_are_those_that_cannot_grow(max_pixels, step):
    allowed = all_sizes(max_pixels, step)
    largest = {(h, w) for h, w in allowed if not any(a >= h and b >= w for a, b in allowed - {(h, w)})}
    found = bucket_sizes(max_pixels, step)
    assert sorted(largest) == list(found)
    assert {(w, h) for h, w in found} == set(found)


def test_the_sizes_of_stable_diffusion():
    assert bucket_sizes(512**2, 64) == ((384, 640), (448, 576), (512, 512), (576, 448), (640, 384))
    assert len(bucket_sizes(1024**2, 64)) == 11
    assert bucket_sizes(64**2, 64) == ((64, 64),)


def part_cropped_away(size, target):
    """Of the area of a picture that is scaled to cover the target, exactly."""
    scale = max(Fraction(target[0], size[0]), Fraction(target[1], size[1]))
    return 1 - Fraction(target[0] * target[1]) / (size[0] * size[1] * scale**2)


@pytest.mark.parametrize(("max_pixels", "step"), [(512**2, 64), (32**2, 8), (50, 7)])
def test_the_least_is_cropped_away(max_pixels, step):
    sizes = bucket_sizes(max_pixels, step)
    draw = np.random.default_rng(0)
    for size in [tuple(pair) for pair in draw.integers(1, 3000, (300, 2)).tolist()] + [(1, 3000), (7, 7), (40, 24)]:
        chosen = best(size, sizes)
        least = min(part_cropped_away(size, other) for other in sizes)
        assert part_cropped_away(size, chosen) == least
        assert kept_part(size, chosen) == pytest.approx(float(1 - least), abs=1e-12)
        equal = [other for other in sizes if part_cropped_away(size, other) == least]
        assert chosen[0] * chosen[1] == max(height * width for height, width in equal)


@pytest.mark.parametrize("side", [1, 63, 512, 5000])
def test_squares_get_the_square(side):
    assert best((side, side), bucket_sizes(512**2, 64)) == (512, 512)


def test_of_equal_losses_the_larger_bucket_wins():
    sizes = [(4, 8), (8, 8), (8, 4), (8, 16)]
    assert best((10, 20), sizes) == (8, 16)
    assert best((10, 20), sizes[:3]) == (4, 8)
    assert best((20, 10), [(8, 4), (2, 1)]) == (8, 4)


# --- examples


def test_an_example_is_the_centre_of_the_picture_in_its_bucket():
    dataset = image_dataset(pictures(), "validation", **BUCKETS)
    assert dataset.pictures.reader.sizes == ((12, 20), (16, 16), (20, 12))
    assert [dataset.bucket_of(index) for index in range(10)] == OF_SIZES * 2
    for index, (height, width) in enumerate(SIZES):
        target = dataset.pictures.reader.sizes[OF_SIZES[index]]
        scale = max(target[0] / height, target[1] / width)
        whole = Image.fromarray(pictures()[index]).resize((round(width * scale), round(height * scale)), 2)
        left, top = (whole.width - target[1]) // 2, (whole.height - target[0]) // 2
        expected = np.asarray(whole.crop((left, top, left + target[1], top + target[0]))) / 127.5 - 1
        example = dataset.get(index, None)
        assert np.abs(example["image"].permute(1, 2, 0).numpy() - expected).max() < 1e-6
        assert example["original_size"].tolist() == [height, width]
        assert example["crop_top_left"].tolist() == [top, left]
        assert min(whole.width - target[1], whole.height - target[0]) == 0
        datasets_lib.check_example(example, settings(**BUCKETS))


@pytest.mark.parametrize("changed", [{}, {"center_crop": True}, {"random_flip": True, "interpolation": "bicubic"}])
def test_decoded_ahead_and_on_demand_are_the_same_with_masks(changed):
    masks = [picture[:, :, 0] for picture in pictures()]
    options = {**BUCKETS, **changed, "known": {"masks": masks}}
    ahead, on_demand = image_dataset(pictures(), **options), image_dataset(pictures(), image_cache_mb=0, **options)
    ahead.prepare(show_progress=False)
    assert ahead.pictures.decoded is not None
    for index, seed in itertools.product(range(10), range(4)):
        example = ahead.get(index, seeded(seed))
        assert_same(example, on_demand.get(index, seeded(seed)))
        assert (
            example["mask"].shape[1:]
            == example["image"].shape[1:]
            == ahead.pictures.reader.sizes[ahead.bucket_of(index)]
        )
        datasets_lib.check_example(example, settings(**BUCKETS))
        without = on_demand.without_image(index, seeded(seed))
        if changed.get("center_crop"):
            assert torch.equal(on_demand.image(index, without["flipped"]), example["image"])
        assert_same({**without, "image": 0}, {**example, "flipped": without["flipped"], "image": 0})


def test_the_left_over_is_cropped_anywhere_unless_at_the_centre():
    corners = {
        center_crop: {
            tuple(
                image_dataset(pictures(), center_crop=center_crop, **BUCKETS)
                .get(4, seeded(s))["crop_top_left"]
                .tolist()
            )
            for s in range(60)
        }
        for center_crop in (True, False)
    }  # 64 x 20 pixels become 38 x 12, of which 20 x 12 are shown
    assert corners[True] == {(9, 0)}
    assert {top for top, _ in corners[False]} >= {0, 18}
    assert {left for _, left in corners[False]} == {0}


def test_pictures_that_fit_their_buckets_need_no_draws():
    dataset = image_dataset(pictures(4, [(24, 40), (32, 32)]), **BUCKETS)
    assert dataset.random
    dataset.prepare(show_progress=False)
    assert not dataset.random


def test_keys_are_of_the_content_in_its_bucket():
    options = {**BUCKETS, "center_crop": True}
    keys = [image_dataset(pictures(), **options).image_keys(index) for index in range(5)]
    assert len(set(keys)) == 5
    others = image_dataset(pictures(), **{**options, "bucket_max_pixels": 13 * 20})  # of the same step, and still these
    assert [others.image_keys(index) for index in range(5)] == keys
    square = image_dataset(pictures(), resolution=16, center_crop=True)
    same = [square.image_keys(index) == keys[index] for index in range(5)]
    assert same == [False, True, False, False, False]  # that of the square bucket is the same picture


def test_a_turned_picture_is_in_the_bucket_that_is_seen():
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    dataset = image_dataset([encoded(pictures()[0], "JPEG", exif=exif)], **BUCKETS)
    assert dataset.pictures.reader.sizes[dataset.bucket_of(0)] == (20, 12)
    assert dataset.get(0, None)["image"].shape == (3, 20, 12)


# --- broken pictures


@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize("keep", [0, 60])  # bytes of the file: nothing, or its header
def test_a_broken_picture_is_replaced_by_one_of_its_bucket(prepared, keep):
    images = [encoded(picture) for picture in pictures(15)]
    images[2] = images[2][:keep]
    dataset = image_dataset(images, bad_images="skip", **BUCKETS)
    if prepared:
        dataset.prepare(show_progress=False)
    bucket = 2 if keep else 0  # without a header the most frequent
    assert [dataset.bucket_of(index) for index in (1, 2, 3)] == [1, bucket, 0]
    instead = {2: 4, 0: 3}[bucket]
    assert_same(dataset.get(2, None), dataset.get(instead, None))
    assert dataset.bad_count == 1


def test_the_last_of_a_bucket_cannot_be_replaced():
    images = [encoded(picture) for picture in pictures(11, [(40, 40)] * 10 + [(30, 50)])]
    images[10] = images[10][:60]
    dataset = image_dataset(images, bad_images="skip", **BUCKETS)
    with pytest.raises(
        ValueError, match=r"none of the 1 images of memory in the bucket of 20 x 12 \(width x height\) pix"
    ):
        dataset.get(10, None)


def test_headers_that_cannot_be_read():
    images = [encoded(picture) for picture in pictures(11)]
    for number in (3, 7):
        images[number] = b""
        with pytest.raises(ValueError, match=r"cannot use image row [37] of memory: it is empty or in no known image"):
            image_dataset(images, **BUCKETS).bucket_of(0)
    with pytest.raises(
        ValueError, match="2 of 11 images cannot be read, and base.bad_images=skip replaces 10 % at most"
    ):
        image_dataset(images, bad_images="skip", **BUCKETS).bucket_of(0)


# --- the order


def buckets_of(counts):
    return [bucket for bucket, count in enumerate(counts) for _ in range(count)]


COUNTS = [(8, 4, 12), (7, 1, 13), (1,), (3, 2)]


def order_for(counts, size, seed=0):
    buckets = buckets_of(counts)
    return BucketOrder(by_bucket(range(len(buckets)), buckets.__getitem__), size, seed), buckets


@pytest.mark.parametrize("size", [1, 4, 6])
@pytest.mark.parametrize("counts", COUNTS)
def test_every_example_once_per_epoch_up_to_the_stated_remainder(counts, size):
    order, buckets = order_for(counts, size)
    clock = Clock(sum(counts), size, 1, 1, num_epochs=2, bucket_counts=counts)
    assert order.epoch_slots == clock.epoch_slots == sum(-(-count // size) * size for count in counts)
    for epoch in range(3):
        first = epoch * order.epoch_slots
        indices = [order.index(slot) for slot in range(first, first + order.epoch_slots)]
        groups = [indices[start : start + size] for start in range(0, len(indices), size)]
        assert all(len({buckets[index] for index in group}) == 1 for group in groups)
        drawn = Counter(indices)
        for bucket, count in enumerate(counts):
            times = [drawn[index] for index in range(sum(counts)) if buckets[index] == bucket]
            assert min(times) >= 1
            assert max(times) - min(times) <= 1  # whole shuffles, and a part of the next one
            assert sum(times) == -(-count // size) * size


def test_groups_and_their_members_are_shuffled_and_follow_from_the_seed():
    order, buckets = order_for((40, 40, 40), 4)
    slots = range(2 * order.epoch_slots)
    indices = [order.index(slot) for slot in slots]
    kinds = [buckets[index] for index in indices[::4]]
    assert indices[:120] != indices[120:]
    assert kinds[:30] != kinds[30:]
    assert kinds[:30] != sorted(kinds[:30])
    groups = [frozenset(indices[start : start + 4]) for start in range(0, 240, 4)]
    assert not set(groups[:30]) & set(groups[30:])
    assert sorted(indices[:4]) != list(range(min(indices[:4]), min(indices[:4]) + 4))
    assert [order_for((40, 40, 40), 4)[0].index(slot) for slot in reversed(slots)] == indices[::-1]
    assert [order_for((40, 40, 40), 4, seed=1)[0].index(slot) for slot in slots] != indices


class Sized(ImageData):
    """A data set of which `counts` say how many examples each bucket has; an example's shape is its bucket's number."""

    fingerprint, random = "sized", False

    def __init__(self, counts):
        self.buckets = buckets_of(counts)

    def __len__(self):
        return len(self.buckets)

    def bucket_of(self, index):
        return self.buckets[index]

    def get(self, index, generator):
        return {"index": index, "image": torch.zeros(self.buckets[index] + 1)}


@pytest.mark.parametrize(("counts", "steps"), [((8, 4, 12), 5), ((7, 1, 13), 6)])
def test_every_split_of_a_step_sees_the_same_examples_of_one_bucket(counts, steps):
    base, dataset = BaseConfig(buckets=True), Sized(counts)
    streams = []
    for size, accumulation, processes in [(6, 1, 1), (3, 2, 1), (3, 1, 2), (1, 3, 2), (2, 1, 3), (1, 2, 3)]:
        clock = Clock(len(dataset), size, accumulation, processes, num_epochs=1, bucket_counts=counts)
        assert clock.total_steps == steps
        order = order_of(dataset, clock.global_batch_size, base)
        ranks = [list(SlotBatches(order, clock, rank, 0)) for rank in range(processes)]
        streams.append(sorted(key for batches in ranks for batch in batches for key in batch))
    assert all(stream == streams[0] for stream in streams)
    assert [slot for slot, _ in streams[0]] == list(range(6 * steps))
    for step in range(steps):
        assert len({dataset.bucket_of(index) for _, index in streams[0][6 * step : 6 * step + 6]}) == 1


def test_epochs_are_counted_in_whole_steps():
    clock = Clock(21, 4, 1, 1, num_epochs=3, bucket_counts=(7, 1, 13))  # 2 + 1 + 4 steps
    assert (clock.epoch_slots, clock.total_steps) == (28, 21)
    assert [step for step in range(1, 22) if clock.due(step, None, 1)] == [7, 14, 21]
    assert clock.epochs(14) == {"epoch": 2.0}
    assert clock.resumed_at(5, 20).total_steps == 21


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("counts", [(1,), (5, 1), (9, 2, 4)])
def test_validation_counts_every_example_once_in_batches_of_one_bucket(processes, counts):
    base, dataset = BaseConfig(train_batch_size=4, buckets=True), Sized(counts)
    with StopSignals(1800.0) as stopping:
        shares = [
            list(examples_once(dataset, range(len(dataset)), base, rank, processes, CPU, stopping))
            for rank in range(processes)
        ]
    assert len({len(share) for share in shares}) == 1
    counted = [batch["index"].tolist() for share in shares for batch, weight in share if weight]
    assert sorted(itertools.chain(*counted)) == list(range(len(dataset)))
    assert len(counted) == sum(-(-count // 4) for count in counts)


# --- runs


@pytest.fixture
def folder(tmp_path):
    """Fourteen captioned pictures in three buckets, and five held-out ones."""
    target = tmp_path / "pictures"
    (target / "held").mkdir(parents=True)
    rows = []
    for number, picture in enumerate(pictures(19)):
        name = f"{'held/' if number >= 14 else ''}{number}.png"
        Image.fromarray(picture).save(target / name)
        rows.append({"file_name": name, "text": f"a cat {number}"})
    (target / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return target


@pytest.fixture
def options(folder, tmp_path):
    return {
        "base.dataset": None,
        "base.train_data_dir": str(folder),
        "base.validation_split": "held",
        "base.caption": "",
        "base.buckets": True,
        "base.bucket_step": 8,
        "base.center_crop": True,
        "base.random_flip": True,
        "base.checkpointing_steps": 3,
        "text_to_image.validation_prompts": ["a cat 1"],
    }


@pytest.fixture
def seen(monkeypatch):
    """The shapes of the latents of every batch that a loss is computed of in training."""
    from trainers.common.text_to_image.stable_diffusion import StableDiffusionTrainer

    shapes, compute = [], StableDiffusionTrainer.compute_loss

    def watched(self, batch, rng, step):
        shapes.append(tuple(batch["mean"].shape))
        return compute(self, batch, rng, step)

    monkeypatch.setattr(StableDiffusionTrainer, "compute_loss", watched)
    return shapes


def numbers(folder):
    """Losses of training and validation."""
    found = [float.fromhex(value) for value in losses(folder).values()]
    return found + [v for line in read_metrics(folder, prefix="valid") for k, v in line.items() if "loss" in k]


def test_an_epoch_ends_after_whole_steps_and_batches_have_one_shape(run_in_process, options, seen, capsys):
    epochs = {**options, "base.num_epochs": 2, "base.max_train_steps": None}
    run = run_in_process("run", "text_to_image", **epochs)
    # 6 of 24 x 40, 3 of 32 x 32 and 5 of 40 x 24 pixels (height x width), in batches of 4
    assert Counter(seen) == {(4, 4, 6, 10): 2 * 2, (4, 4, 8, 8): 2 * 1, (4, 4, 10, 6): 2 * 2}
    assert Counter(seen[:5]) == Counter(seen[5:])
    assert len(losses(run)) == 10
    assert read_metrics(run, prefix="epoch")[-1]["epoch"] == 2.0
    printed = capsys.readouterr().out
    assert "NOTE: buckets: 14 examples in 3 sizes; an epoch draws 6 again, to fill the last step of each" in printed
    assert "10 (2.0 epochs)" in printed


@pytest.mark.parametrize("workers", [slow(0), 2])
def test_a_resumed_run_is_the_same(run_in_process, options, workers):
    options |= {"base.center_crop": False, "base.image_cache_mb": 0}
    whole = run_in_process("whole", "text_to_image", **options)
    options |= {"base.dataloader_num_workers": workers, "base.resume_from_checkpoint": str(whole / "checkpoint-3")}
    again = run_in_process("again", "text_to_image", **options)
    assert list(losses(again).items()) == list(losses(whole).items())[3:]
    assert final_state(again, 6) == final_state(whole, 6)


def test_cached_and_uncached_training_are_the_same(run_in_process, options, capsys):
    plain = run_in_process("plain", "text_to_image", **options)
    for kind in ("memory", "disk"):
        found = run_in_process(kind, "text_to_image", **options, **{"text_to_image.cache_latents": kind})
        assert numbers(found) == pytest.approx(numbers(plain), rel=1e-5)
    assert "cache latents: 33 of 33 to encode" in capsys.readouterr().out  # 14 both ways, 5 held out


def test_one_crop_is_cached(run_in_process, options):
    options |= {"base.center_crop": False, "text_to_image.cache_latents": "memory"}
    with pytest.raises((ValueError, ConfigError), match=r"base.center_crop"):
        run_in_process("run", "text_to_image", **options)


@pytest.mark.slow
def test_two_processes_and_accumulation_bit_for_bit(run_in_process, tiny_config, options, tmp_path):
    options |= {"base.train_batch_size": 2}
    two = tmp_path / "two"
    done = launch(tiny_config("text_to_image", **options), f"base.output_dir={two}", processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("an epoch draws 6 again") == 1

    options |= {"base.gradient_accumulation_steps": 2}
    one = run_in_process("one", "text_to_image", **options)
    assert losses(one) == losses(two)
    assert final_state(one, 6) == final_state(two, 6)
    validated = [{k: v for k, v in read_metrics(run, prefix="valid")[-1].items() if "loss" in k} for run in (one, two)]
    assert validated[0] == pytest.approx(validated[1], rel=1e-6)

    forget_after(two, 3)
    options |= {"base.output_dir": str(two), "base.resume_from_checkpoint": "latest"}
    run_in_process("again", "text_to_image", **options)
    assert losses(two) == losses(one)
    assert final_state(two, 6) == final_state(one, 6)


def test_another_global_batch_is_refused(run_in_process, options):
    options |= {"base.max_train_steps": 3}
    first = run_in_process("run", "text_to_image", **options)
    options |= {
        "base.resume_from_checkpoint": str(first / "checkpoint-3"),
        "base.train_batch_size": 2,
        "base.max_train_steps": 6,
        "base.allow_changes": ["global_batch_size", "max_train_steps"],
    }
    message = (
        r"12 examples in 3 steps, the last of 4, and the global batch is 2 now: with base.buckets it must be the sa"
    )
    with pytest.raises(ValueError, match=message):
        run_in_process("again", "text_to_image", **options)


def test_buckets_begin_with_whole_steps(tmp_path):
    clock = Clock(8, 4, 1, 1, max_train_steps=9, bucket_counts=(8,))
    check_steps({"global_batch_size": 4, "slot": 12, "step": 3}, clock, tmp_path)
    grown = {"global_batch_size": 4, "slot": 10, "step": 3}  # without buckets the first two steps had 3 examples
    check_steps(grown, clock._replace(bucket_counts=()), tmp_path)
    with pytest.raises(ValueError, match=r"10 examples in 3 steps, the last of 4, and the global batch is 4 now"):
        check_steps(grown, clock, tmp_path)


# --- mistakes

CONFIG = {
    "base": {"train_data_dir": "x", "num_epochs": 1, "buckets": True},
    "text_to_image": {"pretrained_model_name_or_path": "x"},
}


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ({"buckets": False, "bucket_step": 8}, "base.bucket_step = 8: has an effect with buckets: true only"),
        (
            {"buckets": False, "bucket_max_pixels": 8},
            "base.bucket_max_pixels = 8: has an effect with buckets: true only",
        ),
        ({"resolution": 32}, "base.bucket_step = 64: must be at least 1, and at most resolution = 32"),
        ({"bucket_max_pixels": 4095}, "base.bucket_max_pixels = 4095: must be at least the square of bucket_step = 64"),
        (
            {"class_data_dir": "x", "class_caption": "x"},
            "base.buckets = true: does not work with pictures of the class",
        ),
        ({"eval_steps": 5}, "base.eval_steps = 5: measures pictures of one size, and cannot with buckets: true"),
    ],
)
def test_settings_that_do_not_go_together(base, message):
    document = json.loads(json.dumps(CONFIG))
    document["base"] |= base
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_config(document, [], datasets_lib.problems)


@pytest.mark.parametrize("task", ["ddpm", "conditional_ddpm", "dit", "vae", "noisy_classifier"])
def test_tasks_that_need_one_size(task):
    document = {"base": CONFIG["base"], task: {}}
    with pytest.raises(ConfigError, match=f"base.buckets = true: {task} takes pictures of one size; set it to false"):
        check_config(document, [], datasets_lib.problems)


def build_without_buckets(args, split):
    class Own(Sized):
        bucket_of = property()

    return Own([3])


def test_data_sets_without_buckets():
    name = f"{__name__}:build_without_buckets"
    with pytest.raises(
        ValueError, match=r"returned a Own without bucket_of; .*for base.buckets bucket_of\(index\), a num"
    ):
        datasets_lib.build(settings(dataset=name, **BUCKETS), "train")
    with pytest.raises(
        ValueError, match=r"base.buckets = true: the data set has no bucket_of\(index\); set it to false"
    ):
        Clock.of_run(BaseConfig(buckets=True), 3, Accelerator(cpu=True))


def test_an_example_of_no_bucket():
    example = {"image": torch.zeros(3, 16, 20)}
    message = (
        r"image has shape \[3, 16, 20\], expected \[3, 12, 20\] or \[3, 16, 16\] or \[3, 20, 12\] from base.channels"
    )
    with pytest.raises(ValueError, match=message):
        datasets_lib.check_example(example, settings(**BUCKETS))
    example = {"image": torch.zeros(3, 20, 12), "mask": torch.zeros(1, 12, 20)}
    with pytest.raises(ValueError, match=r"mask has shape \[1, 12, 20\], expected \[1, 20, 12\] from 1, the buckets"):
        datasets_lib.check_example(example, settings(**BUCKETS))


# --- the report


def test_the_report_shows_the_buckets(inspect, folder, tmp_path):
    (folder / "held").rename(tmp_path / "held")
    (folder / "metadata.jsonl").unlink()
    code, lines, _ = inspect(train_data_dir=str(folder), buckets=True, resolution=16, bucket_step=4)
    lost = [float(part_cropped_away(SIZES[n % 5], [(12, 20), (16, 16), (20, 12)][OF_SIZES[n % 5]])) for n in range(14)]
    parts = [[lost[n] for n in range(14) if OF_SIZES[n % 5] == bucket] for bucket in range(3)]
    means = [f"{sum(each) / len(each):.1%} cropped away in the mean" for each in (lost, *parts)]
    assert code == 0
    assert section(lines, "train")["buckets"] == [
        f"3 sizes (width x height), {means[0]}",
        f"20 x 12: 6 pictures, {means[1]}",
        f"16 x 16: 3 pictures, {means[2]}",
        f"12 x 20: 5 pictures, {means[3]}",
    ]
    assert section(lines, "train")["enlarged"] == ["0 have a side of less than their bucket's"]
    (folder / "3.png").write_bytes(b"")
    code, lines, _ = inspect(train_data_dir=str(folder), buckets=True, resolution=16, bucket_step=4)
    assert (code, section(lines, "train")["unusable"][0]) == (1, "1")


def test_pictures_of_several_sizes_on_one_sheet():
    dataset = image_dataset(pictures(3), **BUCKETS)
    sheet = sheet_of(dataset, [0, 1, 2])
    widest, tallest = 6 * 20, 6 * 20  # pixels: of 20 x 20, which holds all, six times
    assert sheet.size == (3 * (widest + 2) + 2, tallest + 16 + 2 + 2)


def test_a_step_can_be_replayed(run_in_process, options, tmp_path):
    from scripts.replay import replay
    from trainers.engine.config.config import load_config

    run = run_in_process("run", "text_to_image", **options, **{"text_to_image.use_ema": False})
    found = replay(load_config(run / "config.yaml"), run, 4)
    assert found["losses"] == [float.fromhex(losses(run)[4])]
    assert found["pictures"].shape[:2] == (4, 3)
    assert found["pictures"].shape[2:] in {(24, 40), (32, 32), (40, 24)}


def test_pictures_are_measured_at_one_size(run_in_process, options, monkeypatch):
    import sys

    from scripts import evaluate

    run = run_in_process("run", "text_to_image", **options)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(run), "--number", "5", "--features", "none"])
    evaluate.main()
    assert json.loads((run / "evaluation" / "metrics.json").read_text())["pictures"] == 5


def test_sides_are_multiples_of_a_latent(run_in_process, options):
    with pytest.raises(ValueError, match=r"bucket_step = 6: must be a multiple of 4, the pixels per latent of text_to"):
        run_in_process("run", "text_to_image", **{**options, "base.bucket_step": 6})
