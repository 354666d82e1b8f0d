"""Reads what runs leave in their folders, and cuts them back to a checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from trainers.engine.checkpoint.manifest import list_checkpoints


def read_metrics(folder, *, prefix=None):
    """The lines of metrics.jsonl; with a prefix only those that have such a key."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if prefix is None or any(key.startswith(prefix) for key in line)]


def losses(folder):
    """{step: loss as float.hex()} of a run."""
    return {line["step"]: line["loss"].hex() for line in read_metrics(folder) if "loss" in line}


def logged_steps(folder):
    """The steps that a run has logged so far: it may not have begun, be writing, or have been killed while it wrote."""
    path = Path(folder) / "metrics.jsonl"
    whole = [line for line in path.read_text().splitlines(True) if line.endswith("\n")] if path.exists() else []
    return [line["step"] for line in map(json.loads, whole) if "loss" in line]


def steps_of(folder):
    return [step for step, _ in list_checkpoints(folder)]


def hidden(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def final_state(folder, step=6):
    """{file: its SHA-256} of a checkpoint: weights, averages and optimizer state."""
    manifest = json.loads((folder / f"checkpoint-{step}" / "manifest.json").read_text())
    return {name: digest for name, (_, digest) in manifest.items() if name.endswith(".safetensors")}


def forget_after(folder, step):
    """What a run that was killed right after checkpoint-<step> leaves behind, with a torn last line of metrics."""
    for later, path in list_checkpoints(folder):
        if later > step:
            shutil.rmtree(path)
    (folder / "model_index.json").unlink(missing_ok=True)  # not every task has one
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
