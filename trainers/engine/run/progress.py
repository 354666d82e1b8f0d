"""Bars of progress on the main process: one over the steps of the run, others over what takes long within a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from accelerate import Accelerator
from tqdm.auto import tqdm

from trainers.engine.run.clock import Clock


def progress_bar(accelerator: Accelerator, clock: Clock) -> tqdm:
    shown = {"disable": not accelerator.is_main_process, "dynamic_ncols": True}
    return tqdm(total=clock.total_steps, initial=clock.origin_step, desc="steps", unit="step", **shown)


def passing_bar(accelerator: Accelerator, what: str) -> Callable[[Iterable], Iterable]:
    """A bar over something that may take long within a step; it shows after two seconds and goes when it is done."""
    return partial(
        tqdm, desc=what, delay=2, leave=False, disable=not accelerator.is_main_process, dynamic_ncols=True, position=1
    )
