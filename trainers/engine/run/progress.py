"""Progress bars on the main process: one for the run's steps, others for long loops within a step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from accelerate import Accelerator
from tqdm.auto import tqdm

from trainers.engine.run.clock import Clock

Item = TypeVar("Item")


def progress_bar(accelerator: Accelerator, clock: Clock) -> tqdm:
    hidden, total, first = not accelerator.is_main_process, clock.total_steps, clock.origin_step
    return tqdm(total=total, initial=first, desc="steps", unit="step", disable=hidden, dynamic_ncols=True)


def passing_bar(accelerator: Accelerator, what: str, items: Iterable[Item], total: int | None = None) -> Iterable[Item]:
    """Shows a bar for a loop that may take long; it appears after two seconds and disappears at the end."""
    hidden = not accelerator.is_main_process
    return tqdm(items, what, total, leave=False, delay=2, disable=hidden, dynamic_ncols=True, position=1)
