"""The interface of a tracker: a place beside metrics.jsonl for the numbers and pictures of a run."""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainers.engine.config.config import RunConfig

RUN_ID_FILES = "*-run-id"  # in logging_dir; removed when a run leaves the branch that a service holds


class ExternalTracker(ABC):
    """Shows a run somewhere: made on the main process alone, once the step that the run starts from is known.

    A new one is a file of this folder, a row in TRACKERS and the word in BaseConfig.logger. One that takes numbers
    alone has `start` and `log`.
    """

    def __init__(self, run: RunConfig, output_dir: Path, start_step: int) -> None:
        self.run, self.output_dir = run, output_dir
        self.logging_dir = output_dir / run.base.logging_dir  # for files; it exists
        self.start_step = start_step  # of the checkpoint that the run goes on from, or 0; later steps may come again

    @abstractmethod
    def start(self) -> None:
        """Opens it and shows the run's configuration. Raises ValueError if it cannot, with what to do about that."""

    @abstractmethod
    def log(self, values: dict[str, float], step: int) -> None:
        """Takes numbers by name, which may be nan or infinite; a step can have several calls."""

    def log_grids(self, grids: dict[str, Tensor], step: int) -> None:
        """Takes the pictures of a validation, one [C, H, W] in [0, 1] for each name."""
        return None

    def log_table(self, requests: list[dict[str, Any]], pictures: list[dict[str, Tensor]], step: int) -> None:
        """Takes what a validation asked for and its pictures one by one, {name: [N, C, H, W]}.

        The raw weights' come first, the averaged ones' second.
        """
        return None

    def log_pipeline(self, paths: list[Path], metadata: dict[str, Any]) -> None:
        """Takes the files and folders of a finished pipeline, with its step and epoch."""
        return None

    def close(self) -> None:
        """Sends what is left; the last call, while all processes are still there."""
        return None

    def run_id(self, service: str) -> str:
        """The id under which a service that cannot take steps back continues this run; a new one from step 0."""
        path = self.logging_dir / RUN_ID_FILES.replace("*", service)
        if not (self.start_step and path.is_file()):
            path.write_text(secrets.token_hex(4), encoding="utf-8")
        return path.read_text(encoding="utf-8")


def opaque_pixels(picture: Tensor) -> np.ndarray:
    """uint8 [H, W, 3] of a picture [C, H, W]; what is transparent becomes white, as TensorBoard takes no alpha."""
    color, alpha = picture[:3], picture[3:] if len(picture) == 4 else 1.0
    opaque = color * alpha + (1 - alpha)
    return (opaque * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
