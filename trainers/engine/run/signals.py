"""Ends a run early, after a signal or a fault on any rank: all ranks agree, and stop after the same step."""

from __future__ import annotations

import faulthandler
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather_object

from datasets_lib.errors import FileError, InputError
from trainers.engine.config.errors import Interrupted

EXIT_CODES: dict[int, int] = {signal.SIGINT: 130, signal.SIGUSR1: 75, signal.SIGTERM: 143, signal.SIGHUP: 129}
FAULT, DIVERGED = 100, 101  # further reasons, larger than any signal: the ranks agree on the largest
LAST_SIGNAL = 3  # the first two request a stop, the third kills the process
WAY_ON = "continue with base.resume_from_checkpoint=latest"
STDERR = 2  # file descriptor: a signal handler may interrupt a print()

Item = TypeVar("Item")


class Abandoned(BaseException):
    """Leaves a validation unfinished, on all ranks at the same place."""


class StopSignals:
    """Collects requests to stop; the loop calls `agreed` once per step, whose reduce carries votes on checkpoints too.

    Outside the steps a signal ends the run at once; it is remembered first, as a library may swallow the exception, or
    turn it into one of its own, and is looked at again between the stages of the start, and at the end.

    Several processes agree through a separate process group on the CPU, so no step waits for a device; the answer is
    one call old.
    """

    # steps of the newest checkpoint whose files are written by this rank (infinite if it never writes), and by all
    written = written_by_all = math.inf

    def __init__(self, collective_timeout: float) -> None:
        self.main, self.timeout = True, collective_timeout
        self.group: dist.ProcessGroup | None = None
        self.work: dist.Work | None = None
        self.armed = -math.inf  # when the stack dump was last postponed
        self.asked, self.text = 0, ""  # reason of this rank
        self.reason = 0  # of all ranks together
        self.received = 0
        self.waits = False  # whether signals wait for the end of a step
        self.ended = False  # whether all steps are done; the final validation is not interrupted
        self.steps_done = 0
        self.launcher = launcher_pid()
        self.limited: Callable[[Iterable, str], Iterable] = lambda items, what: items  # a dry run leaves most out

    def __enter__(self) -> StopSignals:
        self.handlers: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # elsewhere Python does not allow it
            wanted = set(EXIT_CODES) - ({signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set())
            self.handlers = {number: signal.signal(number, self._receive) for number in wanted}  # nohup ignores HUP
        self.hook, sys.unraisablehook = sys.unraisablehook, self._swallowed
        return self

    def _swallowed(self, unraisable: Any) -> None:
        """Keeps Python from printing that a __del__ or a callback swallowed a signal, which is remembered."""
        if not isinstance(unraisable.exc_value, Interrupted):
            self.hook(unraisable)

    def join(self, accelerator: Accelerator) -> None:
        """Takes part in the agreement of the launched processes. Collective."""
        self.main = accelerator.is_main_process
        place = accelerator.process_index / accelerator.num_processes
        self.dump_after = (0.9 + 0.08 * place) * self.timeout  # one after another, or the stack dumps would mix
        if accelerator.num_processes > 1:
            group = dist.new_group(backend="gloo", timeout=timedelta(seconds=self.timeout))
            assert isinstance(group, dist.ProcessGroup)  # all ranks are members
            self.group = group

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        faulthandler.cancel_dump_traceback_later()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        sys.unraisablehook = self.hook
        if kind is None or issubclass(kind, Exception):
            self.raise_if_asked()

    def raise_if_asked(self) -> None:
        """Raises Interrupted, outside of the steps, for a signal whose own exception was lost on its way."""
        if 0 < self.asked < FAULT and not self.waits:
            name = signal.Signals(self.asked).name
            raise Interrupted(f"ended by {name} outside of the steps; {WAY_ON}", EXIT_CODES[self.asked]) from None

    def _receive(self, number: int, frame: object) -> None:
        self.received += 1
        if self.received >= LAST_SIGNAL:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.ask(number)
        self.raise_if_asked()
        if self.main:
            with suppress(OSError):  # the terminal may be gone
                os.write(STDERR, f"\n{signal.Signals(number).name}: finishing the step, then saving\n".encode())

    def ask(self, reason: int, text: str = "") -> None:
        """Requests a stop of all ranks: because of a signal, a FAULT (saves first) or DIVERGED (does not save)."""
        if reason > self.asked:
            self.asked, self.text = reason, text

    def agreed(self, wait: bool = False) -> bool:
        """Whether the run stops; the same on every rank. Collective. With `wait` the answer is this call's own."""
        if self.launcher and os.getppid() != self.launcher:  # the launcher died, and nothing else reports that
            self.ask(signal.SIGTERM)
        if self.group is None:
            self.reason, self.written_by_all = self.asked, self.written
            return self.reason > 0
        if time.monotonic() - self.armed > 1:  # each call starts a thread
            faulthandler.dump_traceback_later(self.dump_after, file=STDERR)  # shows where a rank hangs
            self.armed = time.monotonic()
        self._await()
        self.flag = torch.tensor([self.asked, -self.written], dtype=torch.float64)
        self.work = dist.all_reduce(self.flag, dist.ReduceOp.MAX, self.group, async_op=True)
        if wait:
            self._await()
        return self.reason > 0

    def _await(self) -> None:
        if self.work is not None:
            self.work.wait()
            reason, unwritten = self.flag.tolist()
            self.reason, self.written_by_all = max(self.reason, int(reason)), -unwritten

    def steps(self, first: int, last: int) -> Iterator[int]:
        """Yields the steps from first to last - 1, during which signals wait; ends once a stop is agreed on."""
        self.raise_if_asked()
        self.waits, self.steps_done = True, first
        for step in range(first, last):
            self.steps_done = step + 1  # true when the loop asks for the next step, or ends
            yield step
            if self.reason:
                break

    def watch(self, items: Iterable[Item], what: str) -> Iterator[Item]:
        """Yields a long loop's items, equally many on every rank; raises Abandoned if a stop is agreed on meanwhile."""
        for item in self.limited(items, what):
            yield item
            if not self.ended and self.agreed():
                raise Abandoned

    def finish(self, save: Callable[[int], None], close: Callable[[], None]) -> None:
        """Ends the steps: if the run stops early, saves it, closes the trackers and raises. Collective.

        Raises Interrupted after a signal, OSError after a fault, ValueError if the run diverged. Signals wait until
        then: a launcher sends more of them when its first process ends.
        """
        if not self.agreed(wait=True):
            self.waits, self.ended = False, True
            self.raise_if_asked()  # by a signal since the agreement
            faulthandler.cancel_dump_traceback_later()
            return
        save(self.steps_done)
        close()
        text = next(filter(None, gather_object([self.text])), "")  # all ranks leave together, after the trackers
        way_on = f"checkpoint-{self.steps_done} is written; {WAY_ON}"
        if self.reason == DIVERGED:
            raise InputError(text)
        if self.reason == FAULT:
            raise FileError(f"{text}; {way_on}")
        name = signal.Signals(self.reason).name
        text = f"ended by {name} after step {self.steps_done}; {way_on}" if self.main else ""  # once is enough
        raise Interrupted(text, EXIT_CODES[self.reason])


def launcher_pid() -> int | None:
    """The parent's pid if it is accelerate or torchrun; a shell may end before a run that it started."""
    known = ("accelerate", "torchrun", "torch.distributed")
    with suppress(psutil.Error):  # another user's process
        parent = psutil.Process(os.getppid())
        if any(Path(argument).name.startswith(known) for argument in parent.cmdline()[:4]):
            return parent.pid
    return None
