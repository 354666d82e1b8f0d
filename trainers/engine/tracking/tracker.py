"""Logs numbers and pictures: to metrics.jsonl and samples/, and to the trackers of `base.logger`."""

from __future__ import annotations

import importlib
import math
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from datasets_lib.foreign import shown
from trainers.engine.config.config import RunConfig
from trainers.engine.config.trust import RUN_CONFIG
from trainers.engine.distributed.collectives import run_on_main
from trainers.engine.run.context import RunContext
from trainers.engine.run.files import append_line, make_folder, new_file, write_text
from trainers.engine.run.run_folder import (
    INDEX_FILES,
    METRICS,
    SAMPLES,
    SKIPPED_STEPS,
    cut_lines,
    read_lines,
    set_metrics_aside,
)
from trainers.engine.run.signals import FAULT
from trainers.engine.tracking import COMBINED, TRACKERS
from trainers.engine.tracking.external import ExternalTracker
from trainers.engine.tracking.gallery import write_gallery
from trainers.engine.tracking.meters import take_peak_memory

METRIC = re.compile(r"[\w/@.-]+")  # the name of a number in the log of an earlier start, which goes into the card
GRID = re.compile(r"[\w.-]+-step-\d+\.png")


class Tracker:
    """Writes on the main process; other ranks only keep the newest values."""

    def __init__(self, ctx: RunContext, start_seconds: dict[str, float]) -> None:
        accelerator, run, output_dir, start_step = ctx.accelerator, ctx.run, ctx.output_dir, ctx.clock.origin_step
        self.ctx = ctx
        self.accelerator, self.device = accelerator, accelerator.device
        self.output_dir, self.start_step, self.metrics_file = output_dir, start_step, output_dir / METRICS
        self.peak_of_steps = 0.0  # memory of those that were not logged yet
        self.start_seconds = start_seconds  # metrics of the time before the first step
        self.latest: dict[str, Any] = {}  # the newest value of each metric, for the model card
        self.grids: list[Path] = []  # the newest grids
        self.trackers: list[ExternalTracker] = []  # on the main process
        self.lost_writes = 0  # of pictures and trackers
        self.logged_at = run_on_main(accelerator, lambda: self._open(run, start_step))

    def _open(self, run: RunConfig, start_step: int) -> dict[str, int]:
        """Starts the trackers at the run's step; returns the step at which each metric was last logged."""
        make_folder(self.output_dir / run.base.logging_dir)
        logged_at = self._resume_logs(start_step)
        for name in COMBINED.get(run.base.logger, (run.base.logger,)):
            module, _, cls = TRACKERS[name].partition(":")
            self.trackers.append(getattr(importlib.import_module(module), cls)(run, self.output_dir, start_step))
            self.trackers[-1].start()
        write_text(self.output_dir / RUN_CONFIG, run.as_yaml())
        return logged_at

    def _resume_logs(self, start_step: int) -> dict[str, int]:
        """Cuts the logs after the step, and reads the newest values; returns when each metric was last logged."""
        has_pipeline = any((self.output_dir / name).exists() for name in INDEX_FILES)
        if start_step == 0 and has_pipeline:  # a run that has lost its checkpoints
            set_metrics_aside(self.output_dir, f"set-aside-{secrets.token_hex(2)}-", keep=True)
        for name in (METRICS, SKIPPED_STEPS):
            cut_lines(self.output_dir / name, start_step)
        logged_at: dict[str, int] = {}
        if start_step == 0:
            return logged_at
        for line in read_lines(self.metrics_file):
            numbers = {k: math.nan if v is None else v for k, v in line.items() if k != "step" and METRIC.fullmatch(k)}
            self.latest |= {k: float(v) for k, v in numbers.items() if isinstance(v, (int, float)) and abs(v) < 1e300}
            logged_at |= dict.fromkeys(line, line["step"])
        pictures = sorted(path for path in (self.output_dir / SAMPLES).glob("*.png") if _is_grid(path))
        self.grids = list({path.name.rpartition("-step-")[0]: path for path in pictures}.values())
        return logged_at

    def __enter__(self) -> Tracker:
        self.log(self.start_seconds | {"start/peak_memory_gib": take_peak_memory(self.device)}, self.start_step)
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self.close()
        finally:
            self.accelerator.end_training()  # leaves the process group

    def close(self) -> None:
        while self.trackers:
            self._optional(self.trackers.pop().close)

    @contextmanager
    def phase(self, name: str, step: int) -> Iterator[dict[str, float]]:
        """Logs the block's duration and peak memory, with the values that it puts into the yielded dict."""
        self.peak_of_steps = max(self.peak_of_steps, take_peak_memory(self.device))
        values: dict[str, float] = {}
        began = time.perf_counter()
        yield values
        seconds = time.perf_counter() - began
        self.log(values | {f"{name}/seconds": seconds, f"{name}/peak_memory_gib": take_peak_memory(self.device)}, step)

    def log_steps(self, values: dict[str, float], step: int) -> None:
        """Logs the numbers of the last steps, with their peak memory outside other phases."""
        peak = max(self.peak_of_steps, take_peak_memory(self.device))
        self.peak_of_steps = 0.0
        self.log(values | {"peak_memory_gib": peak}, step)

    def log(self, values: dict[str, float], step: int) -> None:
        self.latest |= values
        if not (values and self.accelerator.is_main_process):
            return
        line = {"step": step} | {k: v if math.isfinite(v) else None for k, v in values.items()}
        try:
            self.ctx.held.check()
            append_line(self.metrics_file, line)
        except OSError as error:
            if not self.ctx.stop.waits:
                raise
            self.ctx.stop.ask(FAULT, str(error))  # saves first, wherever that is possible
        for tracker in self.trackers:
            self._optional(tracker.log, values, step)

    def _optional(self, write: Callable[..., None], *arguments: Any) -> None:
        """Writes what is not worth a run: a failure is a warning, once, and counted."""
        try:
            write(*arguments)
        except Exception as error:  # each service has its own
            self.lost_writes += 1
            if self.lost_writes == 1:
                what = "pictures or a tracker's files cannot be written, and the run goes on without them"
                print(f"WARNING: {what}: {shown(error)}", flush=True)

    def log_grids(self, grids: dict[str, Tensor], step: int) -> None:
        """Saves pictures [C, H, W] in [0, 1] as samples/<name>-step-<step>.png and sends them to the trackers."""
        if not self.accelerator.is_main_process:
            return
        from torchvision.utils import save_image

        def save(name: str, grid: Tensor) -> None:
            path = self.output_dir / SAMPLES / f"{name}-step-{step:06d}.png"
            path.parent.mkdir(exist_ok=True)
            with new_file(path) as file:
                save_image(grid, file, "PNG")
            self.grids.append(path)

        self.grids = []
        for name, grid in grids.items():
            self._optional(save, name, grid)
        for tracker in self.trackers:
            self._optional(tracker.log_grids, grids, step)

    def log_table(self, requests: list[dict[str, Any]], pictures: list[dict[str, Tensor]], step: int) -> None:
        if self.accelerator.is_main_process and "prompt" in requests[0]:
            first = next(iter(pictures[-1].values()))  # what was drawn; others, such as strips, are made of it
            self._optional(write_gallery, self.output_dir, requests, first)
        for tracker in self.trackers:
            self._optional(tracker.log_table, requests, pictures, step)

    def log_pipeline(self, names: list[str], metadata: dict[str, Any]) -> None:
        for tracker in self.trackers:
            self._optional(tracker.log_pipeline, [self.output_dir / name for name in names], metadata)


def _is_grid(path: Path) -> bool:
    """Whether a picture is one of an earlier start; a link could lead to a file that the card would publish."""
    return bool(GRID.fullmatch(path.name)) and path.is_file() and not path.is_symlink()
