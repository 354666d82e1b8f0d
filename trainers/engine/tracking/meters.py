"""Measures between two log lines: means over the steps, examples per second, peak memory."""

from __future__ import annotations

import math
import re
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

UNREAD_CALLS = 1000  # values of at most this many add() calls wait on the device
PROCESS = Path("/proc/self")
RESET_PEAK = "5"  # what clear_refs takes for "forget the highest resident size"


class Meter:
    """Means by name over a window of steps; values that are not finite are left out, as those of skipped steps.

    Values wait on the device, so that a step needs no synchronisation; the host adds them one by one in double
    precision, so that a resumed run gets the same bits.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.unread: list[tuple[list[str], Tensor]] = []  # on the device
        self.sums: dict[str, list[float]] = {}  # [sum, count]

    @torch.no_grad()
    def add(self, values: dict[str, Tensor]) -> None:
        """Adds 0-dim tensors, which may change afterwards."""
        self.unread.append((list(values), torch.stack([value.float() for value in values.values()])))
        if len(self.unread) == UNREAD_CALLS:
            self._read()

    def _read(self) -> None:
        if not self.unread:
            return
        names = [name for names, _ in self.unread for name in names]
        numbers = torch.cat([values for _, values in self.unread]).tolist()
        self.unread = []
        for name, number in zip(names, numbers, strict=True):
            window = self.sums.setdefault(name, [0.0, 0.0])
            if math.isfinite(number):
                window[0] += number
                window[1] += 1

    def means(self) -> dict[str, float]:
        """Returns the means over all processes and starts a new window. Collective; waits for the device."""
        self._read()
        if not self.sums:
            return {}
        windows = torch.tensor(list(self.sums.values()), device=self.accelerator.device)
        names, sums = list(self.sums), self.accelerator.reduce(windows, "sum").tolist()
        self.sums = {}
        return {name: total / count if count else math.nan for name, (total, count) in zip(names, sums, strict=True)}

    def state(self) -> dict[str, list]:
        """Returns every process's open window, [process, name, 2], so that a resumed run logs the same. Collective."""
        self._read()
        if not self.sums:
            return {}
        return {"names": list(self.sums), "windows": gather_object([list(self.sums.values())])}

    def load(self, state: dict[str, list]) -> None:
        """Restores a saved window; with another number of processes the first one gets the sum."""
        windows = torch.tensor(state.get("windows", []), dtype=torch.float64)
        if not len(windows):
            return
        rank = self.accelerator.process_index
        if len(windows) == self.accelerator.num_processes:
            mine = windows[rank]
        else:
            mine = windows.sum(0) if rank == 0 else torch.zeros_like(windows[0])
        self.sums = dict(zip(state["names"], mine.tolist(), strict=True))


class Speed:
    """Training speed in examples per second, without the time of validations and saves."""

    def __init__(self) -> None:
        self.since, self.examples = time.perf_counter(), 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.since += time.perf_counter() - began

    def metrics(self) -> dict[str, float]:
        """Returns the rate since the last call, as "examples_per_second"."""
        now, since, examples = time.perf_counter(), self.since, self.examples
        self.since, self.examples = now, 0
        return {"examples_per_second": examples / max(now - since, 1e-9)}


def take_peak_memory(device: torch.device) -> float:
    """Returns the peak in GiB since the last call: of the device on CUDA, else of this process.

    On systems that cannot reset the peak of a process, it is the peak since the process began.
    """
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / 2**30
    with suppress(OSError):  # without /proc
        found = re.search(r"VmHWM:\s+(\d+) kB", (PROCESS / "status").read_text(encoding="ascii"))
        (PROCESS / "clear_refs").write_text(RESET_PEAK, encoding="ascii")
        if found:
            return int(found[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
