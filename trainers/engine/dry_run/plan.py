"""A short run that stands for a whole one: its last steps on a few examples, and one each of what a run repeats."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from operator import length_hint
from typing import Any, NamedTuple

import torch

from trainers.engine.config.base_options import BaseConfig
from trainers.engine.config.config import RunConfig
from trainers.engine.data.batches import by_bucket
from trainers.engine.run.clock import Clock
from trainers.engine.run.context import DataSets, RunContext
from trainers.engine.validation.metrics import LEAST_PICTURES, spread

WARM_STEPS, TIMED_STEPS = 2, 5
WARM_ITEMS, TIMED_ITEMS = 1, 4  # of a sampler's steps
HELD_OUT_BATCHES = 4  # of each process


class Plan(NamedTuple):
    """What the whole run does, by the real clock from step 0."""

    steps: int
    global_batch_size: int
    examples: int
    held_out: int
    saves: int
    validations: int
    evaluations: int
    exports: int
    largest: str  # what is said of the shape of the examples

    @classmethod
    def of(cls, clock: Clock, base: BaseConfig, examples: int, held_out: int, largest: str) -> Plan:
        def times(*cadence: int | None) -> int:
            return sum(clock.due(done, *cadence) for done in range(1, clock.total_steps + 1))

        return cls(
            clock.total_steps,
            clock.global_batch_size,
            examples,
            held_out,
            times(base.checkpointing_steps),
            times(base.valid_steps, base.valid_epochs),
            times(base.eval_steps) if base.eval_steps is not None else 0,
            times(base.save_model_steps, base.save_model_epochs),
            largest,
        )


class DryRun:
    """Makes a run short, and keeps what was left out: `plan` and the data sets are there once the data was read."""

    def __init__(self, run: RunConfig, short: RunConfig) -> None:
        self.run, self.short = run, short  # the whole one, and the one that is trained
        self.plan: Plan | None = None
        self.sets: list[tuple[Any, Any]] = []  # (whole, few) of training and of validation
        self.scale: dict[str, float] = {}  # how many times longer a loop or a column of the whole is, by name
        self.skipped = 0.0  # seconds, of the phase that runs
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
        ctx.stop.limited, ctx.stop.take_skipped_seconds = self.limited, self.take_skipped_seconds
        ctx.clock = self._shortened(ctx.clock, *data)
        return DataSets(*(few for _, few in self.sets))

    def _shortened(self, clock: Clock, train_set: Any, validation_set: Any | None) -> Clock:
        """Sets the plan of the whole run and the few examples; returns the clock of the last steps."""
        base, size, measured = (
            self.run.base,
            clock.global_batch_size,
            getattr(self.run.trainer_class, "statistics_samples", 0),
        )
        largest = ""
        if base.streaming:
            few, examples, few_examples = train_set, 0, measured
        else:
            candidates = range(len(train_set))
            if base.buckets:
                candidates, largest = _largest_bucket(train_set)
            few = _only(train_set, candidates, (WARM_STEPS + TIMED_STEPS) * size)
            examples, few_examples = len(train_set), len(few)
        held_out = 0 if validation_set is None else len(validation_set)
        self.plan = Plan.of(clock, base, examples, held_out, largest)
        self.sets = [(train_set, few), (validation_set, validation_set)]
        if measured:
            self.scale["measuring"] = min(examples or measured, measured) / min(few_examples, measured)
        if held_out:
            batches = HELD_OUT_BATCHES * clock.micro_batch_size * clock.num_processes
            count = max(batches, LEAST_PICTURES, self.run.config.valid_batch_size)  # a task may draw what it is shown
            self.sets[1] = validation_set, _only(validation_set, range(held_out), count)
            self.scale["validating"] = held_out / len(self.sets[1][1])
        for column, (whole, few_values) in _columns([each for each in self.sets if each[0] is not None]).items():
            self.scale[column] = whole / few_values
        first = max(clock.total_steps - WARM_STEPS - TIMED_STEPS, 0)
        counts = (few_examples,) if base.buckets else ()
        fixed = {"num_epochs": None, "max_train_steps": clock.total_steps, "bucket_counts": counts}
        fixed["num_examples"] = None if base.streaming else few_examples
        return clock._replace(**fixed).resumed_at(first, first * size)

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
            self.skipped += (_now() - began) / max(shown - first, 1) * (count - shown)
        else:
            self.skipped += (_now() - began) * (self.scale.get(what, 1.0) - 1.0)

    def take_skipped_seconds(self) -> float:
        """The seconds left out since the last call."""
        seconds, self.skipped = self.skipped, 0.0
        return seconds


def _now() -> float:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def _only(dataset: Any, candidates: Iterable[int], count: int) -> Any:
    """So many of the candidates, evenly spread; a data set that cannot be divided stays whole."""
    candidates = list(candidates)
    return dataset.only([candidates[number] for number in spread(len(candidates), count)])


def _columns(sets: list[tuple[Any, Any]]) -> dict[str, tuple[int, int]]:
    """How many values encoders find in each column: of the whole sets, and of the few."""
    train_set = sets[0][0]
    counts = {}
    for column in train_set.picture_columns:
        known = [pair for pair in sets if column in pair[0].picture_columns]
        counts[column] = tuple(sum(each.image_count(column) for each in part) for part in zip(*known, strict=True))
    if train_set.captions() is not None:
        known = [pair for pair in sets if pair[0].captions() is not None]
        counts["caption"] = tuple(
            len({t for each in part for t in each.captions()}) for part in zip(*known, strict=True)
        )
    return counts


def _largest_bucket(train_set: Any) -> tuple[list[int], str]:
    """The examples of the bucket with the most pixels, and what is said of it."""
    members = by_bucket(range(len(train_set)), train_set.bucket_of)
    shapes = {number: train_set.get(each[0], None)["image"].shape for number, each in members.items()}
    largest = max(shapes, key=lambda number: shapes[number].numel())
    _, height, width = shapes[largest]
    return members[largest], f"of {width} x {height} pixels, the largest of {len(members)} sizes"
