"""Progress bars on the main process: one for the run's steps, others for long loops within a step."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TypeVar

from accelerate import Accelerator
from tqdm.auto import tqdm

from trainers.engine.run.clock import Clock

FILE_SECONDS = 10.0  # between two states of the bar in a file, where all of them stay

Item = TypeVar("Item")


def progress_bar(accelerator: Accelerator, clock: Clock) -> tqdm:
    hidden, total, first = not accelerator.is_main_process, clock.total_steps, clock.origin_step
    seconds = 0.1 if sys.stderr.isatty() else FILE_SECONDS
    return tqdm(
        total=total, initial=first, desc="steps", unit="step", disable=hidden, dynamic_ncols=True,
        mininterval=seconds, maxinterval=max(10.0, seconds),
    )  # fmt: skip


def passing_bar(accelerator: Accelerator, what: str, items: Iterable[Item], total: int | None = None) -> Iterable[Item]:
    """Shows a bar for a loop that may take long; it appears after two seconds and disappears at the end."""
    hidden = not accelerator.is_main_process
    return tqdm(items, what, total, leave=False, delay=2, disable=hidden, dynamic_ncols=True, position=1)
