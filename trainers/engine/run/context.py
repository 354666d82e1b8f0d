"""Where and when a run takes place: its processes, folders, clock, and the signals that stop it."""

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
from trainers.engine.run.held_folder import HeldFolder
from trainers.engine.run.run_folder import open_run_folder
from trainers.engine.run.signals import StopSignals


class DataSets(NamedTuple):
    train: ImageData
    validation: ImageData | None

    def uncached(self) -> DataSets:
        """The data sets with pictures instead of keys of an encoder's cache."""
        return DataSets(self.train.uncached(), None if self.validation is None else self.validation.uncached())


@dataclass
class RunContext:
    """The processes, configuration, folders, stop signals and clock of a run."""

    accelerator: Accelerator
    run: RunConfig
    folders: Folders
    held: HeldFolder  # this process's folder of the run
    stop: StopSignals
    clock: Clock = field(init=False)  # set once the data is loaded, whose examples it counts; moved on resume

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def output_dir(self) -> Path:
        return Path(self.run.base.output_dir)


@contextmanager
def start(run: RunConfig) -> Iterator[RunContext]:
    """Joins the launched processes; signal handlers, the folder's lock and numerical settings hold inside the block."""
    with StopSignals(run.base.collective_timeout) as stop:
        accelerator = start_accelerator(run.base)
        stop.join(accelerator)
        with open_run_folder(accelerator, run.base) as (folders, held), numerics(run.base):
            yield RunContext(accelerator, run, folders, held, stop)
