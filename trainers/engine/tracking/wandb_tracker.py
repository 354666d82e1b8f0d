"""Weights & Biases: one run over several starts, tables of pictures, and pipelines as artifacts."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import wandb
from torch import Tensor

from datasets_lib.errors import InputError
from trainers.engine.tracking.external import ExternalTracker, opaque_pixels


class WandBTracker(ExternalTracker):
    """A run of the project `tracker_project`, which a resumed run continues."""

    def start(self) -> None:
        base = self.run.base
        try:
            self.wandb_run = wandb.init(
                project=base.tracker_project,
                name=base.run_name or self.output_dir.resolve().name,
                dir=str(self.logging_dir),
                id=self.run_id("wandb"),
                resume="allow",
            )
        except Exception as error:
            if type(error).__module__.startswith("wandb"):
                reason = f"base.logger = {base.logger}: W&B does not start: {error}"
                raise InputError(f"{reason}; run `wandb login`, or set WANDB_MODE=offline") from None
            raise
        self.wandb_run.config.update(self.run.as_dict(), allow_val_change=True)

    def log(self, values: dict[str, float], step: int) -> None:
        self.wandb_run.log(values, step=step)

    def log_grids(self, grids: dict[str, Tensor], step: int) -> None:
        for name, grid in grids.items():
            self.wandb_run.log({name: [wandb.Image(opaque_pixels(grid))]}, step=step)

    def log_table(self, requests: list[dict[str, Any]], pictures: list[dict[str, Tensor]], step: int) -> None:
        """Logs "<name>_table" per name: a row for each request, with its pictures of raw and averaged weights."""
        kinds = ["raw", "averaged"] if len(pictures) == 2 else ["picture"]
        columns: list[str | int] = ["number", *requests[0], *kinds]
        for name in pictures[0]:
            data: list[Iterable[Any]] = []
            for number, request in enumerate(requests):
                shown = [wandb.Image(opaque_pixels(drawn[name][number])) for drawn in pictures]
                data.append([number, *map(str, request.values()), *shown])
            self.wandb_run.log({f"{name}_table": wandb.Table(columns=columns, data=data)}, step=step)

    def log_pipeline(self, paths: list[Path], metadata: dict[str, Any]) -> None:
        """Logs the files as the next version of an artifact of type model."""
        artifact = wandb.Artifact(f"pipeline-{self.wandb_run.id}", type="model", metadata=metadata)
        for path in paths:
            artifact.add_dir(str(path), name=path.name) if path.is_dir() else artifact.add_file(str(path))
        self.wandb_run.log_artifact(artifact)

    def close(self) -> None:
        self.wandb_run.finish()
