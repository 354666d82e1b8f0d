"""Runs of train() that are measured, and sides that are measured in turns."""

from __future__ import annotations

import importlib
import io
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState, GradientState

from train import train
from trainers.base import Trainer
from trainers.engine.config.config import RunConfig, load_config
from trainers.engine.run.run_folder import METRICS, read_lines
from trainers.engine.validation.validation import Validation

ROOT = Path(__file__).parents[2]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # where accelerate puts train()
Look = Callable[[Validation, int], None]  # gets the number of steps that are done


class Enough(Exception):
    """Raised by a look: the run ends here, without its last save and its export."""


def configured(config: str, folder: str, steps: int, overrides: Sequence[str] = (), windows: int = 1) -> RunConfig:
    """A run that logs every `steps` steps: once to warm up, then `windows` times."""
    last = (1 + windows) * steps
    task = load_config(config, []).task
    quiet = [
        f"base.output_dir={folder}/run", f"base.max_train_steps={last}", f"base.logging_steps={steps}",
        "base.logger=none", "base.resume_from_checkpoint=null", "base.valid_steps=null", "base.validation_split=null",
        f"base.checkpointing_steps={last}", f"{task}.lr_scheduler=constant", f"{task}.lr_warmup_steps=null",
    ]  # fmt: skip
    return load_config(config, [*quiet, *overrides])


def examples_per_second(run: RunConfig, look: Look = lambda validation, steps_done: None) -> list[float]:
    """Trains without console output; returns the logged rates without the first: with data and logging, without saves.

    `look` replaces validations, which the rates leave out: it is called before the first step and after each one.
    """
    looking = patch.multiple(Validation, make_up=look, after_step=look)
    with quiet(), looking, suppress(Enough):
        train(run)
    reset_accelerate()
    return logged(run, "examples_per_second")[1:]


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps what is printed inside from the console."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield


def reset_accelerate() -> None:
    """Forgets accelerate's state, which is global: the next run starts with a new one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def logged(run: RunConfig, name: str) -> list[float]:
    """A metric of a run at its log lines."""
    return [line[name] for line in read_lines(Path(run.base.output_dir) / METRICS) if name in line]


def beside(run: RunConfig, others: Mapping[str, Callable[[Trainer], Callable[[], Any]]]) -> dict[str, list[float]]:
    """Examples per second of "diffloop" and of the others by windows of steps, in turns in one process.

    The others make their step from the trainer after the run's first window, so that it has the device to itself until
    then; each does as many steps as train() has logged.
    """
    window, last, made = run.base.logging_steps, run.base.max_train_steps or 0, {}
    rates: dict[str, list[float]] = {name: [] for name in others}

    def take_turns(validation: Validation, steps_done: int) -> None:
        if steps_done == 0 or steps_done % window:
            return
        if steps_done == window:
            made.update({name: make(validation.trainer) for name, make in others.items()})
        for name, step in made.items():
            rates[name].append(window * run.base.train_batch_size / seconds_of(step, window))
        if steps_done == last:
            raise Enough

    one_more = replace(run.base, max_train_steps=last + 1, checkpointing_steps=last + 1)  # a run saves after its last
    ours = examples_per_second(run._replace(base=one_more), take_turns)
    return {"diffloop": ours} | {name: found[1:] for name, found in rates.items()}


def seconds_of(step: Callable[[], Any], steps: int) -> float:
    synchronize()
    began = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize()
    return time.perf_counter() - began


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def in_turns(sides: Mapping[Any, Callable[[], Any]], repetitions: int) -> dict[Any, list[Any]]:
    """Calls all sides in turns, forwards and backwards, so that all meet the same machine."""
    found: dict[Any, list[Any]] = {side: [] for side in sides}
    for repetition in range(repetitions):
        for side in list(sides)[:: 1 if repetition % 2 == 0 else -1]:
            found[side].append(sides[side]())
    return found


def median_ratio(rates: Sequence[float], others: Sequence[float]) -> float:
    """The median of the ratios of rates that were measured at about the same time."""
    return statistics.median(a / b for a, b in zip(rates, others, strict=True))


def in_new_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function in a new process with the same number of threads, whose memory holds nothing else."""
    threads = torch.get_num_threads()
    with multiprocessing.get_context("spawn").Pool(1, torch.set_num_threads, (threads,)) as process:
        return process.apply(function, arguments)


def from_tests(module: str) -> ModuleType:
    """A module of tests/helpers: tiny models, and engines as they run on CPUs."""
    sys.path.append(str(ROOT / "tests" / "helpers"))
    return importlib.import_module(module)
