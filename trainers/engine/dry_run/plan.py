"""Shortens a run to its last steps, a few examples, and one each of its validations, saves and exports."""

from __future__ import annotations

import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from operator import length_hint
from typing import NamedTuple, TypeVar

import torch

from datasets_lib.errors import InputError
from datasets_lib.example import ImageData
from trainers.base import MeasuresData
from trainers.engine.config.base_options import BaseConfig
from trainers.engine.config.config import RunConfig
from trainers.engine.data.batches import by_bucket
from trainers.engine.run.clock import Clock
from trainers.engine.run.context import DataSets, RunContext
from trainers.engine.validation.metrics import LEAST_PICTURES, spread

WARM_STEPS, TIMED_STEPS = 2, 5
WARM_ITEMS, TIMED_ITEMS = 1, 4  # of a sampler's steps
HELD_OUT_BATCHES = 4  # of each process
Item = TypeVar("Item")


class Plan(NamedTuple):
    """Counts what the whole run does from step 0, by its own clock."""

    clock: Clock
    saves: int
    validations: int
    evaluations: int
    exports: int

    @classmethod
    def of(cls, clock: Clock, base: BaseConfig) -> Plan:
        def times(*cadence: int | None) -> int:
            return sum(clock.due(done, *cadence) for done in range(1, clock.total_steps + 1))

        saves, validations = times(base.checkpointing_steps), times(base.valid_steps, base.valid_epochs)
        evaluations = times(base.eval_steps) if base.eval_steps is not None else 0
        return cls(clock, saves, validations, evaluations, times(base.save_model_steps, base.save_model_epochs))


class DryRun:
    """Shortens a run; `plan` and `scale` describe the whole run, once its data has been loaded."""

    plan: Plan

    def __init__(self, run: RunConfig, short: RunConfig) -> None:
        self.run, self.short = run, short  # the whole one, and the one that is trained
        self.held_out, self.largest = 0, ""  # held-out examples; a description of the shape of the examples run here
        self.scale: dict[str, float] = {}  # how many times longer the whole run takes, by part
        self.skipped: dict[str, float] = defaultdict(float)  # seconds that the rest of loops would take, by phase
        self.samples = False  # whether a sampler ran

    def shorten(self, ctx: RunContext, data: DataSets) -> DataSets:
        """Returns the few examples that the last steps need, and sets the clock to these steps."""
        if ctx.folders.several:
            ctx.folders.on_mains(lambda: shutil.rmtree(ctx.output_dir))
            raise InputError(
                f"--dry-run: the processes have {len(ctx.folders.mains)} output folders "
                f"({', '.join(ctx.folders.places)}); give all of them one for it, or run it on one host"
            )
        ctx.stop.limited = self.limited
        self.plan, self.held_out = Plan.of(ctx.clock, self.run.base), len(data.validation or ())
        few = self._few(ctx.clock, data)
        self.scale = _scale(data, few, self.run)
        ctx.clock = _last_steps(ctx.clock, None if self.run.base.streaming else len(few.train))
        return few

    def _few(self, clock: Clock, data: DataSets) -> DataSets:
        """Returns a part of each data set, of the largest bucket if there are buckets."""
        base, (train_set, validation_set) = self.run.base, data
        if not base.streaming:
            candidates: Sequence[int] = range(len(train_set))
            if base.buckets:
                candidates, self.largest = _largest_bucket(train_set)
            train_set = _only(train_set, candidates, (WARM_STEPS + TIMED_STEPS) * clock.global_batch_size)
        if validation_set is not None:
            batches = HELD_OUT_BATCHES * clock.micro_batch_size * clock.num_processes
            count = max(batches, LEAST_PICTURES, self.run.config.valid_batch_size)  # a task may draw held-out examples
            validation_set = _only(validation_set, range(len(validation_set)), count)
        return DataSets(train_set, validation_set)

    def limited(self, items: Iterable[Item], what: str) -> Iterator[Item]:
        """Yields a few items of a loop with a known length, else all; adds up the time of the rest.

        `what` starts with the loop's phase, as its metrics do: "valid: sampling".
        """
        phase, count = what.partition(":")[0], length_hint(items, 0)
        first, shown = (WARM_ITEMS, min(count, WARM_ITEMS + TIMED_ITEMS)) if count else (0, sys.maxsize)
        began, number = _now(), 0
        for number, item in enumerate(items, 1):
            yield item
            if number == first:
                began = _now()
            if number == shown:
                break
        if count:
            self.samples = True
            self.skipped[phase] += (_now() - began) / max(shown - first, 1) * (count - shown)
        else:
            self.skipped[phase] += (_now() - began) * (self.scale.get(what, 1.0) - 1.0)


def _now() -> float:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def _last_steps(clock: Clock, num_examples: int | None) -> Clock:
    """Returns the clock of the last steps, for examples of one size; None: a stream."""
    last = clock.total_steps
    first = max(last - WARM_STEPS - TIMED_STEPS, 0)
    counts = (num_examples or 0,) if clock.bucket_counts else ()
    short = clock._replace(num_examples=num_examples, num_epochs=None, max_train_steps=last, bucket_counts=counts)
    return short.resumed_at(first, first * clock.global_batch_size)


def _only(dataset: ImageData, candidates: Sequence[int], count: int) -> ImageData:
    """Keeps at most `count` candidates, evenly spread; a data set that cannot be divided stays whole."""
    return dataset.only([candidates[number] for number in spread(len(candidates), count)])


def _scale(data: DataSets, few: DataSets, run: RunConfig) -> dict[str, float]:
    """Returns how many times longer the whole run takes for the parts that depend on the number of examples."""
    pairs = {"train": (data.train, few.train), "validation": (data.validation, few.validation)}
    if run.base.streaming:  # a stream's length is unknown, and no cache holds its examples
        del pairs["train"]
    known = {split: (whole, part) for split, (whole, part) in pairs.items() if whole is not None and part is not None}
    found = {f"prepare_{split}": len(whole) / len(part) for split, (whole, part) in known.items()}
    found["valid: examples"] = found.get("prepare_validation", 1.0)
    task = run.trainer_class
    if not run.base.streaming and issubclass(task, MeasuresData) and (most := task.statistics_samples):
        found["export: measuring"] = min(len(data.train), most) / min(len(few.train), most)
    for column in (*data.train.picture_columns, "caption"):
        whole_values, few_values = (_values([pair[n] for pair in known.values()], column) for n in (0, 1))
        found[f"cache_{column}"] = whole_values / max(few_values, 1)
    return found


def _values(datasets: Iterable[ImageData], column: str) -> int:
    """Counts the values that an encoder finds in a column."""
    if column == "caption":
        return len({text for each in datasets for text in each.captions() or ()})
    return sum(each.image_count(column) for each in datasets if column in each.picture_columns)


def _largest_bucket(train_set: ImageData) -> tuple[list[int], str]:
    """Returns the examples of the bucket with the most pixels, and a description of it."""
    members = by_bucket(range(len(train_set)), train_set.bucket_of)
    shapes = {number: train_set.get(each[0], None)["image"].shape for number, each in members.items()}
    largest = max(shapes, key=lambda number: shapes[number].numel())
    _, height, width = shapes[largest]
    return members[largest], f"of {width} x {height} pixels, the largest of {len(members)} sizes"
