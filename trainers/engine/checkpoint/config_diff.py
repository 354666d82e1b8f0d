"""Compares the configuration in a checkpoint with that of the run that resumes from it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from datasets_lib.errors import InputError
from datasets_lib.example import ImageData, StreamData
from datasets_lib.foreign import shown
from trainers.engine.config.config import RunConfig
from trainers.engine.config.schema import coerce, options
from trainers.engine.optim.optimizer import learning_rate_schedule
from trainers.engine.run.clock import Clock

OWN_TO_A_RUN = {"base.output_dir", "base.resume_from_checkpoint", "base.allow_changes"}
COMPARED_RATES = 1000  # steps at which two schedules are compared


class Change(NamedTuple):
    """One difference; `base.allow_changes` accepts it by any of its names."""

    names: tuple[str, ...]
    text: str


def find_changes(
    state: dict[str, Any], run: RunConfig, clock: Clock, train_set: ImageData
) -> tuple[list[Change], list[str]]:
    """Lists the changes that make the rest of the run differ from the uninterrupted run, and texts of the others."""
    found: list[Change] = []
    harmless: list[str] = []
    for key, before, now in option_changes(state["config"], run):
        section, _, option = key.partition(".")
        text = f"{key}: {json.dumps(before)} -> {json.dumps(now)}"
        if option not in (run.base if section == "base" else run.config).free_on_resume:
            found.append(Change((option, key), text))
        elif key not in OWN_TO_A_RUN:
            harmless.append(text)
    if state["global_batch_size"] != clock.global_batch_size:
        text = f"global batch size: {state['global_batch_size']} -> {clock.global_batch_size}"
        found.append(Change(("global_batch_size",), text))
    data = [(state["num_examples"], state["fingerprint"]), (clock.num_examples, train_set.fingerprint)]
    if data[0] != data[1]:
        texts = [f"{'a stream' if count is None else f'{count} examples'} ({shown(key)})" for count, key in data]
        found.append(Change(("dataset",), f"data set: {texts[0]} -> {texts[1]}"))
    if state.get("stream") and isinstance(train_set, StreamData):
        found += _reader_change(state["stream"], clock, train_set)
    return [*found, *_length_change(state, run, clock)], harmless


def _reader_change(saved: list[dict[str, Any]], clock: Clock, stream: StreamData) -> Iterator[Change]:
    """With more or fewer readers, each of them has other shards."""
    before, now = [len(part["readers"]) for part in saved], [len(stream.readers)] * clock.num_processes
    if before != now:
        counts = [f"{len(each)} processes with {each[0]}" for each in (before, now)]
        text = f"readers of the stream: {counts[0]} -> {counts[1]}; they would all begin the next epoch, and leave out "
        text += stream.left_out(saved)
        yield Change(("dataloader_num_workers", "base.dataloader_num_workers"), text)


def check_steps(state: dict[str, Any], clock: Clock, folder: Path) -> None:
    """Raises ValueError if a run with buckets, whose order consists of whole steps, would continue within one."""
    size, slots, steps = clock.global_batch_size, state["slot"], state["step"]
    if clock.bucket_counts and (state["global_batch_size"] != size or slots != steps * size):
        raise InputError(
            f"{folder}: {slots:,} examples in {steps:,} steps, the last of {state['global_batch_size']}, and the "
            f"global batch is {size} now: with base.buckets it must be the same in all steps, and base.allow_changes "
            "cannot accept another; set base.global_batch_size, or start a new run"
        )


def option_changes(saved: dict[str, dict[str, Any]], run: RunConfig) -> Iterator[tuple[str, Any, Any]]:
    """Yields (dotted key, value in the checkpoint, value now); an option missing in the checkpoint had its default."""
    [task] = [section for section in saved if section != "base"]
    if task != run.task:
        yield "base.task", task, run.task
    for section, now, before in (("base", run.base, saved["base"]), (run.task, run.config, saved[task])):
        before = now.with_new_names(before)
        for name, option in options(type(now)).items():
            value = _plain(getattr(now, name))
            default = value if option.default is dataclasses.MISSING else _plain(option.default)
            old = before.get(name, default)
            alike = now.same_on_resume.get(name, ())
            if old != value and not (old in alike and value in alike):
                yield f"{section}.{name}", old, value


def _length_change(state: dict[str, Any], run: RunConfig, clock: Clock) -> Iterator[Change]:
    """Another number of steps matters only if the learning rate depends on it."""
    before, now, done = state["total_steps"], clock.total_steps, clock.origin_step
    old, new = learning_rate_schedule(run.config, before), learning_rate_schedule(run.config, now)
    steps = range(done, max(before, now) + 1, max(1, (max(before, now) - done) // COMPARED_RATES))
    if before != now and any(old(step) != new(step) for step in steps):
        option = "num_epochs" if run.base.num_epochs else "max_train_steps"
        own = {"config": run.as_dict(), "total_steps": now, "global_batch_size": clock.global_batch_size}
        rates = [_rate(of, run, done) for of in (state, own)]
        text = f"steps: {before} -> {now}; the learning rate of the next step would have been {rates[0]}, and is now "
        yield Change((option, f"base.{option}"), text + rates[1])


def _rate(state: dict[str, Any], run: RunConfig, step: int) -> str:
    """Formats a step's learning rate for the configuration, length and batch size of a state."""
    [(section, saved)] = [(name, values) for name, values in state["config"].items() if name != "base"]
    known, settings = options(type(run.config)), {}
    for name in saved.keys() & known.keys():
        try:
            settings[name] = coerce(saved[name], known[name].kind)
        except ValueError as allowed:
            found = f"the checkpoint's state.json has {section}.{name} = {shown(saved[name])}"
            raise InputError(f"{found}: must be {allowed}; take another checkpoint") from None
    config = dataclasses.replace(run.config, **settings)
    factor = learning_rate_schedule(config, state["total_steps"])(step)
    factor *= state["global_batch_size"] if config.scale_lr else 1
    if isinstance(config.learning_rate, dict):
        return ", ".join(f"{rate * factor:.4g} ({name})" for name, rate in config.learning_rate.items())
    return f"{config.learning_rate * factor:.4g}"


def _plain(value: Any) -> Any:
    """Converts a value to what state.json would return for it."""
    return json.loads(json.dumps(value))
