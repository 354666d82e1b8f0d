"""TensorBoard's files: numbers, pictures, and the configuration as a text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from trainers.engine.tracking.external import ExternalTracker, opaque_pixels


class TensorBoardTracker(ExternalTracker):
    """Event files in logging_dir/<tracker_project>."""

    def start(self) -> None:
        self.folder = str(self.logging_dir / self.run.base.tracker_project)
        # purge_step hides what an interrupted run wrote later
        self.writer = SummaryWriter(self.folder, purge_step=self.start_step + 1)
        if self.start_step == 0:  # as text: TensorBoard's hparams take no lists and dicts, and make a second run
            self.writer.add_text("config", f"```yaml\n{self.run.as_yaml()}```", 0)

    def log(self, values: dict[str, float], step: int) -> None:
        with self._reopened():
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)
            self.writer.flush()

    def log_grids(self, grids: dict[str, Tensor], step: int) -> None:
        with self._reopened():
            for name, grid in grids.items():
                self.writer.add_image(name, opaque_pixels(grid), step, dataformats="HWC")

    @contextmanager
    def _reopened(self) -> Iterator[None]:
        """Begins another file after a failed write, as the thread of the old one has ended."""
        try:
            yield
        except OSError:
            self.writer = SummaryWriter(self.folder)
            raise

    def close(self) -> None:
        self.writer.close()
