"""Ending a run early: a signal or a fault that one rank found, agreed on, so that all stop after the same step."""

from __future__ import annotations

import faulthandler
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator

from trainers.engine.config.base_options import BaseConfig
from trainers.engine.config.errors import Interrupted

EXIT_CODES = {signal.SIGINT: 130, signal.SIGUSR1: 75, signal.SIGTERM: 143}
FAULT, DIVERGED = 100, 101  # reasons beside signals, and above all of their numbers: the ranks take the largest
LAST_SIGNAL = 3  # the first ones ask, this one takes its default action


class Abandoned(BaseException):
    """A validation is left unfinished, by all ranks at the same place."""


class Limits:
    """How far a run goes in loops within a step: through all of each; a dry run takes a part of them."""

    skipped_seconds = 0.0  # that the rest of the loops until now would have taken

    def limited(self, items: Iterable, what: str) -> Iterable:
        return items


@dataclass
class CheckpointVotes:
    """The newest checkpoint whose files are written: by this rank (infinite if it writes none), and by all ranks."""

    own: float = math.inf
    all: float = math.inf


class StopSignals:
    """Signals and faults as requests to stop, which the loop asks about once a step; the votes share its reduce.

    Before the steps and after them a signal ends the run at once. On several processes a request is agreed over a
    group of its own on the CPU, so no step waits for a device; the answer is one call old.
    """

    def __init__(self, accelerator: Accelerator, base: BaseConfig) -> None:
        self.main = accelerator.is_main_process
        self.timeout = base.collective_timeout
        place = accelerator.process_index / accelerator.num_processes
        self.dump_after = (0.9 + 0.08 * place) * self.timeout  # one after the other, or the dumps would mix
        self.group = None
        if accelerator.num_processes > 1:
            self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=self.timeout))
        self.work: dist.Work | None = None
        self.armed = -math.inf  # when the stack dump was last put off
        self.asked, self.text = 0, ""  # what this rank wants
        self.reason = 0  # what all ranks agreed on
        self.votes = CheckpointVotes()
        self.received = 0
        self.waits = False  # whether signals wait for the end of a step
        self.ended = False  # whether all steps are done: what comes after them is not left unfinished
        self.steps_done = 0
        self.launcher = launcher_pid()
        self.limits = Limits()

    def __enter__(self) -> StopSignals:
        self.handlers: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # elsewhere Python does not allow it
            self.handlers = {number: signal.signal(number, self._receive) for number in EXIT_CODES}
        return self

    def __exit__(self, *error: object) -> None:
        faulthandler.cancel_dump_traceback_later()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        self.received += 1
        if self.received >= LAST_SIGNAL:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        name = signal.Signals(number).name
        if not self.waits:
            way_on = "continue with base.resume_from_checkpoint=latest"
            raise Interrupted(f"ended by {name} outside of the steps; {way_on}", EXIT_CODES[number])
        self.ask(number)
        if self.main:  # not print(): a handler may run within another print
            os.write(sys.__stderr__.fileno(), f"\n{name}: finishing the step, then saving\n".encode())

    def ask(self, reason: int, text: str = "") -> None:
        """Asks all ranks to stop: for a signal's number, FAULT (after a save) or DIVERGED (without one)."""
        if reason > self.asked:
            self.asked, self.text = reason, text

    def agreed(self, wait: bool = False) -> bool:
        """Whether the run is to stop; the same on every rank. Collective; with `wait` the answer is of this call."""
        if self.launcher and os.getppid() != self.launcher:  # it died, and nobody else would tell
            self.ask(signal.SIGTERM)
        if self.group is None:
            self.reason, self.votes.all = self.asked, self.votes.own
            return self.reason > 0
        if time.monotonic() - self.armed > 1:  # each time costs a thread
            faulthandler.dump_traceback_later(self.dump_after, file=sys.__stderr__)  # where a rank hangs
            self.armed = time.monotonic()
        self._await()
        self.flag = torch.tensor([self.asked, -self.votes.own], dtype=torch.float64)
        self.work = dist.all_reduce(self.flag, dist.ReduceOp.MAX, self.group, async_op=True)
        if wait:
            self._await()
        return self.reason > 0

    def _await(self) -> None:
        if self.work is not None:
            self.work.wait()
            reason, unwritten = self.flag.tolist()
            self.reason, self.votes.all = max(self.reason, int(reason)), -unwritten

    def steps(self, first: int, last: int) -> Iterator[int]:
        """The steps from first to last - 1, during which signals wait; none after a stop was agreed on."""
        self.waits, self.steps_done = True, first
        for step in range(first, last):
            self.steps_done = step + 1  # as soon as the loop asks for the next one, or ends
            yield step
            if self.reason:
                break

    def watch(self, items: Iterable, what: str) -> Iterator:
        """The items of a long loop, as many on every rank; within the steps raises Abandoned once a stop is agreed on.

        A dry run sees the first ones; `what` they are says for how many they stand.
        """
        for item in self.limits.limited(items, what):
            yield item
            if not self.ended and self.agreed():
                raise Abandoned

    def finish(self, save: Callable[[int], None], close: Callable[[], None]) -> None:
        """After the last step: where the run ends early, saves it, closes the trackers and raises. Collective.

        Raises Interrupted after a signal, OSError after a fault, ValueError where the run diverged. Signals wait until
        then: a launcher sends more of them when its first process ends.
        """
        if not self.agreed(wait=True):
            self.waits, self.ended = False, True
            faulthandler.cancel_dump_traceback_later()
            return
        save(self.steps_done)
        close()
        text = self._text_of_all()  # all ranks leave together, after the trackers
        way_on = f"checkpoint-{self.steps_done} is written; continue with base.resume_from_checkpoint=latest"
        if self.reason == DIVERGED:
            raise ValueError(text)
        if self.reason == FAULT:
            raise OSError(f"{text}; {way_on}")
        name = signal.Signals(self.reason).name
        text = f"ended by {name} after step {self.steps_done}; {way_on}" if self.main else ""  # once is enough
        raise Interrupted(text, EXIT_CODES[self.reason])

    def _text_of_all(self) -> str:
        texts = [self.text]
        if self.group is not None:
            texts = [""] * dist.get_world_size(self.group)
            dist.all_gather_object(texts, self.text, self.group)
        return next((text for text in texts if text), "")


def launcher_pid() -> int | None:
    """The parent's pid where it is accelerate or torchrun; a shell may end before a run that it started."""
    parent = os.getppid()
    try:
        arguments = Path(f"/proc/{parent}/cmdline").read_bytes().split(b"\0")[:4]
    except OSError:  # another user's process, or a system without /proc
        return None
    known = ("accelerate", "torchrun", "torch.distributed")
    return parent if any(Path(os.fsdecode(argument)).name.startswith(known) for argument in arguments) else None
