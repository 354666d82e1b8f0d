"""Where numbers and pictures go: metrics.jsonl always, and the trackers that accelerate runs."""

from __future__ import annotations

import json
import math
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainers.engine.config.config import RunConfig
from trainers.engine.distributed.collectives import run_on_main
from trainers.engine.run.context import RunContext
from trainers.engine.run.run_folder import INDEX_FILES, METRICS, SKIPPED_STEPS, cut_lines, read_lines, set_metrics_aside
from trainers.engine.tracking import wandb_tracker
from trainers.engine.tracking.meters import PeakMemory

VALIDATION_TIME = "valid/seconds"  # what each validation logs, so that it can be told whether one was finished
EVALUATION_TIME = "eval/seconds"  # the same of an evaluation


class Tracker:
    """Writes on the main process; other ranks only remember the newest values."""

    def __init__(self, ctx: RunContext, start_seconds: dict[str, float]) -> None:
        accelerator, run, output_dir, start_step = ctx.accelerator, ctx.run, ctx.output_dir, ctx.clock.origin_step
        self.accelerator, self.stop = accelerator, ctx.stop
        self.output_dir, self.start_step = output_dir, start_step
        self.memory, self.peak_of_steps = PeakMemory(accelerator.device), 0.0
        self.start_seconds = start_seconds  # metrics of what came before the first step
        self.latest: dict[str, Any] = {}  # the newest value of each metric, for the model card
        self.grids: list[Path] = []  # the newest grids
        self.logged_at = run_on_main(accelerator, lambda: self._take_up(start_step, run.base.logging_dir))
        self._start_trackers(run, start_step)
        if accelerator.is_main_process:
            (output_dir / "config.yaml").write_text(run.as_yaml(), encoding="utf-8")

    def _take_up(self, start_step: int, logging_dir: str) -> dict[str, int]:
        """Cuts off what a resumed run logs again, and remembers the rest; returns when each metric was last logged."""
        (self.output_dir / logging_dir).mkdir(parents=True, exist_ok=True)
        if start_step == 0 and any(
            (self.output_dir / name).exists() for name in INDEX_FILES
        ):  # a run that has lost its checkpoints
            set_metrics_aside(self.output_dir, f"set-aside-{secrets.token_hex(2)}-", keep=True)
        for name in (METRICS, SKIPPED_STEPS):
            cut_lines(self.output_dir / name, start_step)
        return self._remember() if start_step else {}

    def _remember(self) -> dict[str, int]:
        logged_at = {}
        for line in read_lines(self.metrics_file):
            self.latest |= {k: math.nan if v is None else v for k, v in line.items() if k != "step"}
            logged_at |= dict.fromkeys(line, line["step"])
        newest: dict[str, Path] = {}
        for path in sorted((self.output_dir / "samples").glob("*-step-*.png")):
            newest[path.name.rpartition("-step-")[0]] = path
        self.grids = list(newest.values())
        return logged_at

    def _start_trackers(self, run: RunConfig, start_step: int) -> None:
        main, project = self.accelerator.is_main_process, run.base.tracker_project
        arguments = _tracker_arguments(run, self.output_dir, start_step) if main else {}
        try:
            self.accelerator.init_trackers(project, init_kwargs=arguments)
        except Exception as error:
            if run.base.logger in ("wandb", "both") and type(error).__module__.startswith("wandb"):
                reason = f"base.logger = {run.base.logger}: W&B does not start: {error}"
                raise ValueError(f"{reason}; run `wandb login`, or set WANDB_MODE=offline") from None
            raise
        for tracker in self.accelerator.trackers if main else []:
            if tracker.name == "wandb":
                tracker.store_init_configuration(run.as_dict())
            elif start_step == 0:  # TensorBoard's hparams take no lists and dicts, and make a run of their own
                tracker.tracker.add_text("config", f"```yaml\n{run.as_yaml()}```", 0)

    def __enter__(self) -> Tracker:
        self.log(self.start_seconds | {"start/peak_memory_gib": self.memory.take()}, self.start_step)
        return self

    def __exit__(self, *error: object) -> None:
        self.accelerator.end_training()  # closes the trackers, then leaves the process group

    def close(self) -> None:
        """Closes the trackers, before the processes leave."""
        while self.accelerator.trackers:
            self.accelerator.trackers.pop().finish()

    @property
    def metrics_file(self) -> Path:
        return self.output_dir / METRICS

    @contextmanager
    def phase(self, name: str, step: int) -> Iterator[dict[str, float]]:
        """Logs how long what is done inside took, and its peak of memory, with what is put into the yielded values.

        In a dry run a loop counts as if it had been run whole. Nothing is logged where it is left by an exception.
        """
        self.peak_of_steps = max(self.peak_of_steps, self.memory.take())
        values, limits = {}, self.stop.limits
        began, skipped = time.perf_counter(), limits.skipped_seconds
        yield values
        seconds = time.perf_counter() - began + limits.skipped_seconds - skipped
        self.log(values | {f"{name}/seconds": seconds, f"{name}/peak_memory_gib": self.memory.take()}, step)

    def log_steps(self, values: dict[str, float], step: int) -> None:
        """Logs numbers of the steps since the last such line, with the peak of memory outside of other phases."""
        peak = max(self.peak_of_steps, self.memory.take())
        self.peak_of_steps = 0.0
        self.log(values | {"peak_memory_gib": peak}, step)

    def log(self, values: dict[str, float], step: int) -> None:
        self.latest |= values
        if not (values and self.accelerator.is_main_process):
            return
        line = {"step": step} | {k: v if math.isfinite(v) else None for k, v in values.items()}
        try:
            with self.metrics_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise OSError(f"{self.metrics_file} cannot be written: {error}") from None
        self.accelerator.log(values, step=step)

    def log_grids(self, grids: dict[str, Tensor], step: int) -> None:
        """Saves pictures [C, H, W] in [0, 1] as samples/<name>-step-<step>.png and sends them to the trackers."""
        if not self.accelerator.is_main_process:
            return
        from torchvision.utils import save_image

        self.grids = []
        for name, grid in grids.items():
            path = self.output_dir / "samples" / f"{name}-step-{step:06d}.png"
            path.parent.mkdir(exist_ok=True)
            save_image(grid, path)
            self.grids.append(path)
            for tracker in self.accelerator.trackers:
                arguments = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({name: opaque_pixels(grid)[None]}, step=step, **arguments)

    def log_table(self, requests: list[dict[str, Any]], pictures: list[dict[str, Tensor]], step: int) -> None:
        """What was asked for and what was drawn, as a table where W&B is used."""
        for tracker in self._wandb():
            pixels = [
                {name: [opaque_pixels(image) for image in images[name]] for name in images} for images in pictures
            ]
            wandb_tracker.log_table(tracker, requests, pixels, step)

    def log_pipeline(self, names: list[str], metadata: dict[str, Any]) -> None:
        """Keeps the finished pipeline as an artifact with `metadata` where W&B is used."""
        for tracker in self._wandb():
            wandb_tracker.log_pipeline(tracker, [self.output_dir / name for name in names], metadata)

    def _wandb(self) -> list[Any]:
        return [t for t in self.accelerator.trackers if t.name == "wandb" and self.accelerator.is_main_process]


def opaque_pixels(grid: Tensor) -> np.ndarray:
    """uint8 [H, W, 3]; TensorBoard takes no alpha channel, so what is transparent becomes white."""
    color, alpha = grid[:3], grid[3:] if len(grid) == 4 else 1.0
    opaque = color * alpha + (1 - alpha)
    return (opaque * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()


def _tracker_arguments(run: RunConfig, output_dir: Path, start_step: int) -> dict[str, dict[str, Any]]:
    logging_dir = output_dir / run.base.logging_dir
    if run.base.logger == "tensorboard":
        return {"tensorboard": _tensorboard_arguments(start_step)}
    if run.base.logger == "none":
        return {}
    wandb = {
        "name": run.base.run_name or output_dir.resolve().name,
        "dir": str(logging_dir),
        "id": wandb_tracker.run_id(logging_dir, start_step),
        "resume": "allow",
    }
    return {"tensorboard": _tensorboard_arguments(start_step), "wandb": wandb}


def _tensorboard_arguments(start_step: int) -> dict[str, Any]:
    return {"purge_step": start_step + 1}  # hides what the interrupted run wrote later
