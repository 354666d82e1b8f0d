"""The interface of trackers, which show a run's numbers and pictures in addition to metrics.jsonl."""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainers.engine.config.config import RunConfig
from trainers.engine.run.files import write_text

RUN_ID_FILES = "*-run-id"  # in logging_dir; removed when a run leaves the branch that a service holds

ID_BYTES = 100


class ExternalTracker(ABC):
    """Shows a run somewhere; lives on the main process only.

    A new tracker is a file in this folder, a row in TRACKERS and a word in BaseConfig.logger. For numbers alone,
    `start` and `log` are enough.
    """

    def __init__(self, run: RunConfig, output_dir: Path, start_step: int) -> None:
        self.run, self.output_dir = run, output_dir
        self.logging_dir = output_dir / run.base.logging_dir  # for files; it exists
        self.start_step = start_step  # of the checkpoint resumed from, or 0; later steps may be logged again

    @abstractmethod
    def start(self) -> None:
        """Opens the tracker and logs the configuration; raises ValueError with a remedy if that fails."""

    @abstractmethod
    def log(self, values: dict[str, float], step: int) -> None:
        """Logs numbers by name, which may be nan or infinite; may be called several times for a step."""

    def log_grids(self, grids: dict[str, Tensor], step: int) -> None:
        """Logs a validation's grids, one picture [C, H, W] in [0, 1] per name."""
        return None

    def log_table(self, requests: list[dict[str, Any]], pictures: list[dict[str, Tensor]], step: int) -> None:
        """Logs a validation's requests and pictures, {name: [N, C, H, W]}: of raw weights, then of averaged ones."""
        return None

    def log_pipeline(self, paths: list[Path], metadata: dict[str, Any]) -> None:
        """Logs the files and folders of a finished pipeline, with its step and epoch."""
        return None

    def close(self) -> None:
        """Sends what is left; the last call, before the processes exit."""
        return None

    def run_id(self, service: str) -> str:
        """The id under which a service continues this run on resume; a new one from step 0."""
        path = self.logging_dir / RUN_ID_FILES.replace("*", service)
        if self.start_step and path.is_file() and not path.is_symlink() and path.stat().st_size < ID_BYTES:
            return path.read_text(encoding="utf-8")
        write_text(path, secrets.token_hex(4))  # also for a link, whose content would be sent to the service
        return path.read_text(encoding="utf-8")


def opaque_pixels(picture: Tensor) -> np.ndarray:
    """Converts a picture [C, H, W] to uint8 [H, W, 3], on white: TensorBoard takes no alpha."""
    alpha = picture[3:] if len(picture) == 4 else 1.0
    opaque = picture[:3] * alpha + (1 - alpha)
    return (opaque * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
