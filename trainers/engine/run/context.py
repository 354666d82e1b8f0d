"""Where and when a run takes place: its processes, its folders, its clock, and what may end it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator

from datasets_lib.example import ImageData
from trainers.engine.config.config import RunConfig
from trainers.engine.distributed.launch import numerics, start_accelerator
from trainers.engine.distributed.shared_folders import Folders
from trainers.engine.run.clock import Clock
from trainers.engine.run.run_folder import open_run_folder
from trainers.engine.run.signals import StopSignals


class DataSets(NamedTuple):
    """The examples of a run."""

    train: ImageData
    validation: ImageData | None


@dataclass
class RunContext:
    """Where and when a run takes place."""

    accelerator: Accelerator
    run: RunConfig
    folders: Folders
    stop: StopSignals
    clock: Clock = field(init=False)  # set when the data is there, whose examples it counts; moved by a resumed run

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def output_dir(self) -> Path:
        return Path(self.run.base.output_dir)


@contextmanager
def start(run: RunConfig) -> Iterator[RunContext]:
    """Joins the launched processes, then holds the run folder's lock, the signal handlers and the numerics inside."""
    accelerator = start_accelerator(run.base)
    with (
        StopSignals(accelerator, run.base) as stop,
        open_run_folder(accelerator, run.base) as folders,
        numerics(run.base),
    ):
        yield RunContext(accelerator, run, folders, stop)
