"""A short run that stands for a whole one: its last steps on a few examples, and one each of what a run repeats."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from operator import length_hint
from typing import Any, NamedTuple

import torch

from trainers.engine.config.base_options import BaseConfig
from trainers.engine.config.config import RunConfig
from trainers.engine.data.batches import by_bucket
from trainers.engine.run.clock import Clock
from trainers.engine.run.context import DataSets, RunContext
from trainers.engine.run.signals import Limits
from trainers.engine.validation.metrics import LEAST_PICTURES, spread

WARM_STEPS, TIMED_STEPS = 2, 5
WARM_ITEMS, TIMED_ITEMS = 1, 4  # of a sampler's steps
HELD_OUT_BATCHES = 4  # of each process


class Plan(NamedTuple):
    """What the whole run does, by the real clock from step 0."""

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


class DryRun(Limits):
    """Makes a run short; `plan` and `scale` say what the whole run does, as soon as its data was read."""

    def __init__(self, run: RunConfig, short: RunConfig) -> None:
        self.run, self.short = run, short  # the whole one, and the one that is trained
        self.plan: Plan | None = None
        self.held_out, self.largest = 0, ""  # examples, and what is said of the shape of those that are run
        self.scale: dict[str, float] = {}  # how many times longer the whole run takes for a part of it, by name
        self.samples = False  # whether a sampler ran

    def shorten(self, ctx: RunContext, data: DataSets) -> DataSets:
        """Returns the few examples that the last steps need, and sets the clock to these steps.

        Raises ValueError where the processes have several output folders.
        """
        if ctx.folders.several:
            raise ValueError(
                f"--dry-run: the processes have {len(ctx.folders.mains)} output folders "
                f"({', '.join(ctx.folders.places)}); give all of them one for it, or run it on one host"
            )
        ctx.stop.limits = self
        self.plan, self.held_out = Plan.of(ctx.clock, self.run.base), len(data.validation or ())
        few = self._few(ctx.clock, data)
        self.scale = _scale(data, few, self.run)
        ctx.clock = _last_steps(ctx.clock, None if self.run.base.streaming else len(few.train))
        return few

    def _few(self, clock: Clock, data: DataSets) -> DataSets:
        """A part of each data set, of the largest bucket where there are some."""
        base, (train_set, validation_set) = self.run.base, data
        if not base.streaming:
            candidates: Sequence[int] = range(len(train_set))
            if base.buckets:
                candidates, self.largest = _largest_bucket(train_set)
            train_set = _only(train_set, candidates, (WARM_STEPS + TIMED_STEPS) * clock.global_batch_size)
        if validation_set is not None:
            batches = HELD_OUT_BATCHES * clock.micro_batch_size * clock.num_processes
            count = max(batches, LEAST_PICTURES, self.run.config.valid_batch_size)  # a task may draw what it is shown
            validation_set = _only(validation_set, range(len(validation_set)), count)
        return DataSets(train_set, validation_set)

    def limited(self, items: Iterable, what: str) -> Iterator:
        """The first items of a loop whose length is known, all of another; adds up what the rest would have taken."""
        count = length_hint(items, 0)
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
            self.skipped_seconds += (_now() - began) / max(shown - first, 1) * (count - shown)
        else:
            self.skipped_seconds += (_now() - began) * (self.scale.get(what, 1.0) - 1.0)


def _now() -> float:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def _last_steps(clock: Clock, num_examples: int | None) -> Clock:
    """The clock of the last steps, on so many examples of one size; None: a stream."""
    first = max(clock.total_steps - WARM_STEPS - TIMED_STEPS, 0)
    counts = (num_examples,) if clock.bucket_counts else ()
    fixed = {"num_epochs": None, "max_train_steps": clock.total_steps, "bucket_counts": counts}
    return clock._replace(num_examples=num_examples, **fixed).resumed_at(first, first * clock.global_batch_size)


def _only(dataset: Any, candidates: Sequence[int], count: int) -> Any:
    """So many of the candidates, evenly spread; a data set that cannot be divided stays whole."""
    return dataset.only([candidates[number] for number in spread(len(candidates), count)])


def _scale(data: DataSets, few: DataSets, run: RunConfig) -> dict[str, float]:
    """How many times longer the whole run takes for what the number of examples decides."""
    found, pairs, measured = {}, list(zip(data, few, strict=True)), getattr(run.trainer_class, "statistics_samples", 0)
    if run.base.streaming:
        pairs[0] = None, None  # nobody knows how many examples it has, and no cache holds them
    elif measured:
        found["measuring"] = min(len(data.train), measured) / min(len(few.train), measured)
    for split, (whole, part) in zip(("train", "validation"), pairs, strict=True):
        if whole is not None:
            found[f"prepare_{split}"] = len(whole) / len(part)
    found["validating"] = found.get("prepare_validation", 1.0)
    sets = [DataSets(*each) for each in zip(*pairs, strict=True)]
    for column in (*data.train.picture_columns, "caption"):
        whole_values, few_values = (_values(each, column) for each in sets)
        found[f"cache_{column}"] = whole_values / max(few_values, 1)
    return found


def _values(data: DataSets, column: str) -> int:
    """How many values an encoder finds in a column of both sets."""
    if column == "caption":
        known = [each.captions() for each in data if each is not None]
        return len({text for texts in known for text in texts or ()})
    return sum(each.image_count(column) for each in data if each is not None and column in each.picture_columns)


def _largest_bucket(train_set: Any) -> tuple[list[int], str]:
    """The examples of the bucket with the most pixels, and what is said of it."""
    members = by_bucket(range(len(train_set)), train_set.bucket_of)
    shapes = {number: train_set.get(each[0], None)["image"].shape for number, each in members.items()}
    largest = max(shapes, key=lambda number: shapes[number].numel())
    _, height, width = shapes[largest]
    return members[largest], f"of {width} x {height} pixels, the largest of {len(members)} sizes"
