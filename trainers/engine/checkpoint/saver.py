"""Saves beside the training: a copy at the step, a thread that writes it, a name given by the main thread.

Where the processes have several output folders, each holds every checkpoint whole.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from trainers.engine.checkpoint import writer
from trainers.engine.checkpoint.manifest import list_checkpoints
from trainers.engine.checkpoint.snapshot import Snapshot, TrainState, find_not_finite, snapshot
from trainers.engine.data import stream_batches
from trainers.engine.run.context import RunContext
from trainers.engine.tracking.tracker import Tracker

Result = TypeVar("Result")


class Saver:
    """The checkpoints of a run, one at a time: begun at a step, written by a thread for each folder, then sealed.

    Every call is collective. All ranks seal, or raise, after the same step: the votes go with the stop signals.
    The memory of the copy is kept on the main processes, and written over by the next one once its files are written.
    """

    def __init__(self, ctx: RunContext, state: TrainState, tracker: Tracker) -> None:
        self.ctx, self.state, self.tracker = ctx, state, tracker
        self.folders, self.base, self.output_dir = ctx.folders, ctx.run.base, ctx.output_dir
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self.step = 0  # of the checkpoint in flight; 0 where there is none
        self.kept: dict[str, Tensor] = {}  # the memory of the last copy, for the next one
        self.staged: Future[Path] | None = None  # its folder, on a main process
        if ctx.folders.is_main:
            ctx.stop.votes.own = 0

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, *error: object) -> None:
        """After an error a main process seals alone what is in flight: the other ranks may be gone.

        Whether all folders have it is looked at when the run is resumed; until then no older one is removed.
        """
        if self.step and self.folders.is_main:
            try:
                self._seal()
            except Exception as failure:  # the first error is the one to show
                print(f"WARNING: {failure}", flush=True)
        self.thread.shutdown()

    def after_step(self, steps_done: int) -> None:
        """Seals what is written, and begins a checkpoint where one is due."""
        self._seal_written()
        if self.ctx.clock.due(steps_done, self.base.checkpointing_steps):
            with self.tracker.phase("save", steps_done):  # what the training waits for
                self.begin(steps_done)

    def watch(self, items: Iterable) -> Iterator:
        """The items of a long loop within a step, which asks for stop signals; what is written meanwhile is sealed."""
        for item in items:
            yield item
            self._seal_written()

    def save(self, steps_done: int) -> None:
        """Writes output_dir/checkpoint-N, and returns when it is sealed."""
        self.begin(steps_done)
        self.wait()

    def begin(self, steps_done: int) -> None:
        """Copies what is trained, once the checkpoint before is sealed, and leaves the writing to the thread.

        Does nothing where checkpoint-N is there. Raises ValueError where something that was trained is not finite, and
        what `wait` raises.
        """
        self.wait()
        counts = self.state.nonfinite.state()
        final = self.output_dir / f"checkpoint-{steps_done}"
        if self.state.nonfinite.gave_up or all(self._on_mains(final.exists)):
            return
        broken = find_not_finite(self.state.networks, self.state.ema, self.state.optimizer)
        if broken is not None:
            raise ValueError(
                f"{final.name} is not written: {broken} is not finite; continue from the checkpoint before with "
                "a lower learning rate"
            )
        about, writes = self._about(steps_done, counts), self.folders.is_main
        taken = snapshot(self.state, about, writes, self.kept)
        if writes:
            self.staged = self.thread.submit(self._write, taken)
        self.step = steps_done

    def wait(self) -> None:
        """Seals the checkpoint in flight as soon as it is written in each folder; raises OSError where one is not."""
        if not self.step:
            return
        if self.folders.several:
            self._wait_for_all()  # where another rank dies meanwhile, __exit__ seals alone
        self.step = 0
        self._on_mains(self._seal)
        self._on_mains(self._prune)  # now that all folders have the new one

    def _wait_for_all(self) -> None:
        """Waits for the files of every folder; where one could not be written, no folder keeps them."""
        try:
            self._on_mains(lambda: self.staged.result())
        except (OSError, ValueError):
            if self.folders.is_main and self.staged.exception() is None:
                shutil.rmtree(self.staged.result(), ignore_errors=True)
            self.step = 0
            raise

    def _on_mains(self, action: Callable[[], Result]) -> list[Result]:
        return self.folders.on_mains(self.ctx.accelerator, action)

    def _seal_written(self) -> None:
        if self.step and self.step == self.ctx.stop.votes.all:
            self.wait()

    def _seal(self) -> None:
        writer.seal(self.staged.result())

    def _prune(self) -> None:
        limit = self.base.checkpoints_total_limit
        for _, folder in list_checkpoints(self.output_dir)[limit:] if limit is not None else []:
            writer.remove(folder, self.thread)

    def _write(self, taken: Snapshot) -> Path:
        """The thread's part; this process tells the other ranks that it is over, well or not."""
        try:
            return writer.stage(taken, self.output_dir)
        finally:
            self.ctx.stop.votes.own = taken.step

    def _about(self, steps_done: int, counts: dict[str, int]) -> dict[str, Any]:
        clock, scaler, train_set = self.ctx.clock, self.ctx.accelerator.scaler, self.state.train_set
        return {
            "format": writer.FORMAT,
            "step": steps_done,
            "slot": clock.slot_at(steps_done),
            "global_batch_size": clock.global_batch_size,
            "total_steps": clock.total_steps,
            "num_examples": clock.num_examples,
            "fingerprint": train_set.fingerprint,
            "stream": stream_batches.positions(train_set) if self.base.streaming else None,
            "label_names": train_set.label_names,
            "meter": self.state.meter.state(),
            "divergence": counts,
            "scaler": scaler.state_dict() if scaler is not None else None,
            "config": self.ctx.run.as_dict(),
        }
