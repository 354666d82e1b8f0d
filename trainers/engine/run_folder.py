"""The folder of a run: opened at the start, its files put in place so that a reader never sees half of them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from trainers.engine.options import BaseConfig

RUN_FILES = ("metrics.jsonl", "config.yaml", "model_index.json", "README.md")


def open_run_folder(accelerator: Accelerator, output_dir: Path, base: BaseConfig) -> None:
    """Makes the folder and probes that it can be written.

    Raises OSError where it cannot, ValueError where it holds a run and none is to be resumed; on every rank.
    """
    error: list[Exception | None] = [None]
    if accelerator.is_main_process:
        error = [_open(output_dir, base.resume_from_checkpoint, base.logging_dir)]
    [found] = broadcast_object_list(error)
    if found is not None:
        raise found


def _open(output_dir: Path, resume: str | bool | None, logging_dir: str) -> Exception | None:
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        probe = output_dir / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        return OSError(f"base.output_dir = {output_dir}: cannot be written ({error}); choose another folder")
    held = sorted(path.name for path in output_dir.iterdir() if path.is_dir() or path.name in RUN_FILES)
    held = [] if held == [logging_dir] else held  # all that a start that failed leaves behind
    if held and not resume:
        return ValueError(
            f"base.output_dir = {output_dir}: holds a run or other folders already ({', '.join(held[:5])}); continue "
            "with base.resume_from_checkpoint=latest, choose another base.output_dir, or remove the folder"
        )
    return None


def publish_pipeline(staging: Path, output_dir: Path) -> list[str]:
    """Moves a staged pipeline into the run folder, model_index.json last; returns the names of its entries."""
    index = "model_index.json"
    (output_dir / index).unlink(missing_ok=True)  # until it is back, nothing takes a mixture for a pipeline
    names = sorted(path.name for path in staging.iterdir())
    for name in sorted(names, key=lambda name: name == index):
        _remove(output_dir / name)
        (staging / name).rename(output_dir / name)
    staging.rmdir()
    return names


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def cut_metrics(path: Path, steps_done: int) -> None:
    """Drops the lines of metrics.jsonl after a step: a resumed run writes them again."""
    if not path.exists():
        return
    kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= steps_done]
    replacement = path.with_name(f".{path.name}")
    replacement.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    replacement.replace(path)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):  # the last line of a killed run may be torn
        return float("inf")
