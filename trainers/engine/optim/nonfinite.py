"""Handles steps with a loss or gradient that is not finite: the device skips them, the host learns of it later."""

from __future__ import annotations

import shlex
from collections import deque

import torch
from torch import Tensor

from trainers.engine.run.context import RunContext
from trainers.engine.run.files import append_line
from trainers.engine.run.run_folder import SKIPPED_STEPS
from trainers.engine.run.signals import DIVERGED

SCALE_HALVINGS = 24  # fp16 overflows in a row after which the loss scale is about 1, and not the cause


class NonFiniteSteps:
    """Counts skipped steps in a row, writes each to skipped_steps.jsonl, and asks to stop after `max_skipped_steps`."""

    def __init__(self, ctx: RunContext) -> None:
        self.accelerator, self.base, self.clock, self.stop = ctx.accelerator, ctx.run.base, ctx.clock, ctx.stop
        self.file = ctx.output_dir / SKIPPED_STEPS
        self.finite = torch.ones((), device=ctx.device)  # whether the losses of this step are
        self.pending: deque[tuple[int, list[str], Tensor, torch.cuda.Event | None]] = deque()
        self.skipped_in_a_row = self.overflows_in_a_row = 0
        self.gave_up = False  # the run stops without another save

    def poison_if_nonfinite(self, loss: Tensor) -> Tensor:
        """Makes the loss NaN if it is not finite, as an infinite loss can have a finite gradient.

        Averaging the gradients spreads the NaN to every rank, so that all of them skip the step.
        """
        finite = loss.detach().isfinite()
        self.finite = self.finite * finite
        return loss * torch.where(finite, 1.0, torch.nan)

    def after_step(self, step: int, applied: Tensor, norms: dict[str, Tensor]) -> dict[str, Tensor]:
        """Records a step; returns the metrics "skipped" and, under fp16, "scaler_skipped", 0 or 1. Collective."""
        skipped = 1 - applied
        metrics = {"skipped": skipped}
        if self.accelerator.scaler is not None:  # it skips finite losses with overflowing gradients regularly
            loss_is_bad = self.accelerator.reduce(1 - self.finite, "sum").clamp(max=1)
            metrics = {"skipped": skipped * loss_is_bad, "scaler_skipped": skipped * (1 - loss_is_bad)}
        self.finite = torch.ones_like(self.finite)
        values = torch.stack([skipped, metrics["skipped"], *norms.values()]).to("cpu", non_blocking=skipped.is_cuda)
        event = torch.cuda.current_stream(skipped.device).record_event() if skipped.is_cuda else None
        self.pending.append((step, list(norms), values, event))
        self.read()
        return metrics

    def read(self, wait: bool = False) -> None:
        """Reads the results of steps that the device has finished, or waits for all."""
        while self.pending:
            step, names, values, event = self.pending[0]
            if event is not None and not event.query():
                if not wait:
                    return
                event.synchronize()
            self.pending.popleft()
            not_applied, skipped, *norms = values.tolist()
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
            self.overflows_in_a_row = self.overflows_in_a_row + 1 if not_applied else 0
            if skipped:
                self._write(step, dict(zip(names, norms, strict=True)))
            self._check_limits(step)

    def _write(self, step: int, norms: dict[str, float]) -> None:
        if not self.accelerator.is_main_process:
            return
        line = {
            "step": step + 1,  # as metrics.jsonl counts
            "slots": [self.clock.slot_at(step), self.clock.slot_at(step + 1)],
            "micro_batch_size": self.clock.micro_batch_size,
            "seed": self.base.seed,
        } | {name: str(value) for name, value in norms.items()}
        append_line(self.file, line)

    def _check_limits(self, step: int) -> None:
        """Requests a stop after too many skipped steps in a row."""
        limit = min(self.base.max_skipped_steps, self.clock.total_steps)  # a short run whose steps all fail has failed
        if self.skipped_in_a_row >= limit:
            what = f"the loss or a gradient was not finite in {self.skipped_in_a_row} steps in a row"
        elif self.overflows_in_a_row >= limit + SCALE_HALVINGS:
            what = f"fp16 gradients overflowed in {self.overflows_in_a_row} steps in a row, whatever the loss scale"
        else:
            return
        self.gave_up = True
        folder = shlex.quote(str(self.base.output_dir))
        replay = f"Look at the batch with `python scripts/replay.py {folder} {step + 1}`; "
        self.stop.ask(
            DIVERGED,
            f"{what}, up to step {step + 1} (base.max_skipped_steps = {self.base.max_skipped_steps}); the weights did "
            f"not move in them. {'' if self.base.streaming else replay}{self.file} lists them all. Usual causes: a "
            "learning rate that is too high, broken data, fp16 (try bf16)",
        )

    def state(self) -> dict[str, int]:
        """Returns the counters, for a checkpoint."""
        self.read(wait=True)
        return {"skipped_in_a_row": self.skipped_in_a_row, "overflows_in_a_row": self.overflows_in_a_row}

    def load(self, state: dict[str, int]) -> None:
        self.skipped_in_a_row, self.overflows_in_a_row = state["skipped_in_a_row"], state["overflows_in_a_row"]
