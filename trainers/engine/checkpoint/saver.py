"""Saves checkpoints during training: a copy at the step, a thread that writes it to each folder, a final rename."""

from __future__ import annotations

import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from datasets_lib.errors import FileError, InputError
from datasets_lib.example import StreamData
from trainers.engine.checkpoint import writer
from trainers.engine.checkpoint.manifest import list_checkpoints
from trainers.engine.checkpoint.snapshot import Snapshot, TrainState, find_not_finite, snapshot
from trainers.engine.checkpoint.state_file import FORMAT
from trainers.engine.data import stream_batches
from trainers.engine.run.context import RunContext
from trainers.engine.tracking.tracker import Tracker


class Saver:
    """Writes one checkpoint at a time: copied at a step, written by a thread per folder, then renamed ("sealed").

    Every call is collective. All ranks seal, or raise, after the same step: StopSignals says when all have written.
    The main processes keep the copy's memory and reuse it for the next checkpoint.
    """

    def __init__(self, ctx: RunContext, state: TrainState, tracker: Tracker) -> None:
        self.ctx, self.state, self.tracker = ctx, state, tracker
        self.folders, self.base, self.output_dir = ctx.folders, ctx.run.base, ctx.output_dir
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self.step = 0  # of the checkpoint being written; 0: none is
        self.kept: dict[str, Tensor] = {}  # memory of the last copy, for the next one
        self.staged: Future[Path] = Future()  # its temporary folder, on a main process
        if ctx.folders.is_main:
            ctx.stop.written = 0

    def __enter__(self) -> Saver:
        # the run may have been killed after it sealed a checkpoint, and before it removed older ones
        self.folders.on_mains(lambda: self._prune(self.ctx.clock.origin_step))
        return self

    def __exit__(self, *error: object) -> None:
        """After an error main processes seal alone, as ranks may be dead; on resume all folders are compared."""
        if self.step and self.folders.is_main:
            try:
                self._seal()
            except Exception as failure:  # the first error is the one to show
                print(f"WARNING: {failure}", flush=True)
        self.thread.shutdown()

    def after_step(self, steps_done: int) -> None:
        """Seals a checkpoint whose files are written, and begins one if it is due."""
        self.seal_written()
        if self.ctx.clock.due(steps_done, self.base.checkpointing_steps):
            with self.tracker.phase("save", steps_done):  # the time that the training waits
                self.begin(steps_done)

    def save(self, steps_done: int) -> None:
        """Writes output_dir/checkpoint-N and waits until it is sealed."""
        self.begin(steps_done)
        self.wait()

    def begin(self, steps_done: int) -> None:
        """Seals the previous checkpoint, copies everything trained if it is finite, and lets the thread write it.

        If the run folder was moved meanwhile, writes there and raises OSError.
        """
        self.wait()
        counts = self.state.nonfinite.state()
        name = f"checkpoint-{steps_done}"
        moves, there = zip(*self.folders.on_mains(lambda: self._place_of(name)), strict=True)
        self.output_dir = moves[self.folders.number] or self.ctx.output_dir
        if self.state.nonfinite.gave_up or all(there):
            return
        broken = find_not_finite(self.state.networks, self.state.ema, self.state.optimizer)
        if broken is not None:
            raise InputError(
                f"{name} is not written: {broken} is not finite; continue from the checkpoint before with "
                "a lower learning rate"
            )
        about, writes = self._about(steps_done, counts), self.folders.is_main
        taken = snapshot(self.state, about, writes, self.kept)
        if writes:
            self.staged = self.thread.submit(self._write, taken)
        self.step = steps_done
        for moved in filter(None, moves):
            self.wait()
            raise FileError(
                f"base.output_dir = {self.ctx.output_dir}: was moved to {moved} during the run; "
                f"{name} is there; continue with base.output_dir={moved} base.resume_from_checkpoint=latest"
            )

    def _place_of(self, name: str) -> tuple[Path | None, bool]:
        """Returns where this process's run folder was moved to, if it was, and whether the checkpoint is there."""
        moved = self.ctx.held.moved_to()
        final = (moved or self.ctx.output_dir) / name
        return moved, final.exists() and not final.is_symlink()

    def wait(self) -> None:
        """Waits until every folder has the checkpoint's files, and seals it; raises OSError if one could not write."""
        if not self.step:
            return
        if self.folders.several:
            self._wait_for_all()  # if another rank dies meanwhile, __exit__ seals alone
        step, self.step = self.step, 0
        self.folders.on_mains(self._seal)
        self.folders.on_mains(lambda: self._prune(step))  # only now that all folders have the new one

    def _wait_for_all(self) -> None:
        """Waits for the files of every folder; if one cannot be written, no folder keeps its files."""
        try:
            self.folders.on_mains(lambda: self.staged.result())
        except (OSError, ValueError):
            if self.folders.is_main and self.staged.exception() is None:
                shutil.rmtree(self.staged.result(), ignore_errors=True)
            self.step = 0
            raise

    def seal_written(self) -> None:
        """Seals a checkpoint if all ranks know that its files are written."""
        if self.step and self.step == self.ctx.stop.written_by_all:
            self.wait()

    def _seal(self) -> None:
        staged = self.staged.result()
        writer.seal((self.ctx.held.moved_to() or staged.parent) / staged.name)

    def _prune(self, intact_step: int) -> None:
        """Removes the oldest checkpoints beyond the limit, if the newest is of this step, and so known to be intact."""
        found, limit = list_checkpoints(self.output_dir), self.base.checkpoints_total_limit
        if limit is not None and found and found[0][0] == intact_step:
            for _, folder in found[limit:]:
                self.thread.submit(writer.remove, folder)

    def _write(self, taken: Snapshot) -> Path:
        """Writes the files, in the thread; the vote tells the other ranks that this is over, successfully or not."""
        try:
            return writer.stage(taken, self.output_dir)
        finally:
            self.ctx.stop.written = taken.step

    def _about(self, steps_done: int, counts: dict[str, int]) -> dict[str, Any]:
        clock, scaler, train_set = self.ctx.clock, self.ctx.accelerator.scaler, self.state.train_set
        return {
            "format": FORMAT,
            "step": steps_done,
            "slot": clock.slot_at(steps_done),
            "global_batch_size": clock.global_batch_size,
            "total_steps": clock.total_steps,
            "num_examples": clock.num_examples,
            "fingerprint": train_set.fingerprint,
            "stream": stream_batches.positions(train_set) if isinstance(train_set, StreamData) else None,
            "label_names": train_set.label_names,
            "meter": self.state.meter.state(),
            "divergence": counts,
            "scaler": scaler.state_dict() if scaler is not None else None,
            "config": self.ctx.run.as_dict(),
        }
