"""What only W&B keeps: one run over several starts, tables of pictures, and the pipeline as an artifact."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

import numpy as np

ID_FILE = "wandb-run-id"  # in logging_dir: under which id a resumed run continues


def run_id(logging_dir: Path, start_step: int) -> str:
    """The id under which a resumed run continues; a new one for a run from step 0."""
    path = logging_dir / ID_FILE
    if not (start_step and path.is_file()):
        path.write_text(secrets.token_hex(4), encoding="utf-8")
    return path.read_text(encoding="utf-8")


def log_table(
    tracker: Any, requests: list[dict[str, Any]], pictures: list[dict[str, list[np.ndarray]]], step: int
) -> None:
    """A table "<name>_table" for each name: a row per request, with its pictures by raw and by averaged weights."""
    import wandb

    kinds = ["raw", "averaged"] if len(pictures) == 2 else ["picture"]
    columns = ["number", *requests[0], *kinds]
    for name in pictures[0]:
        data = []
        for number, request in enumerate(requests):
            shown = [wandb.Image(drawn[name][number]) for drawn in pictures]
            data.append([number, *map(str, request.values()), *shown])
        tracker.log_table(f"{name}_table", columns, data, step=step)


def log_pipeline(tracker: Any, paths: list[Path], metadata: dict[str, Any]) -> None:
    """The files of a pipeline as the next version of an artifact of type model."""
    import wandb

    artifact = wandb.Artifact(f"pipeline-{tracker.run.id}", type="model", metadata=metadata)
    for path in paths:
        artifact.add_dir(str(path), name=path.name) if path.is_dir() else artifact.add_file(str(path))
    tracker.run.log_artifact(artifact)
