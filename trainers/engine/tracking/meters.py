"""What is measured between two log lines: means over the steps, examples per second, the peak of memory."""

from __future__ import annotations

import math
import re
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

UNREAD_CALLS = 1000  # of add() that wait on the device at most, should nobody ask for the means
PROCESS = Path("/proc/self")
RESET_PEAK = "5"  # what clear_refs takes for "forget the highest resident size"


class Meter:
    """Sums and counts by name; what is not finite is left out, so that one skipped step does not hide a window.

    Numbers wait on the device, as a step needs no synchronisation; on the host they are added up in double precision
    and one after the other: a resumed run gets the same bits.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.unread: list[tuple[list[str], Tensor]] = []  # on the device
        self.sums: dict[str, list[float]] = {}  # [sum, count]

    @torch.no_grad()
    def add(self, values: dict[str, Tensor]) -> None:
        """Takes 0-dim tensors; what becomes of them later does not matter."""
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
        """The means over all processes, and a new window. Collective; waits for the device."""
        self._read()
        if not self.sums:
            return {}
        windows = torch.tensor(list(self.sums.values()), device=self.accelerator.device)
        names, sums = list(self.sums), self.accelerator.reduce(windows, "sum").tolist()
        self.sums = {}
        return {name: total / count if count else math.nan for name, (total, count) in zip(names, sums, strict=True)}

    def state(self) -> dict[str, list]:
        """The open window of every process, [process, name, 2]: a resumed run logs the same bits. Collective."""
        self._read()
        if not self.sums:
            return {}
        return {"names": list(self.sums), "windows": gather_object([list(self.sums.values())])}

    def load(self, state: dict[str, list]) -> None:
        """Takes up a saved window; with another number of processes the first one gets the sum."""
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
    """Examples per second of training, without the time that validations and saves take."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.since = time.perf_counter()
        self.examples = 0
        self.pauses = 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.pauses += time.perf_counter() - began

    def metrics(self) -> dict[str, float]:
        """The rate since the last call, as "examples_per_second"."""
        rate = self.examples / max(time.perf_counter() - self.since - self.pauses, 1e-9)
        self.start()
        return {"examples_per_second": rate}


class PeakMemory:
    """The most memory that was in use since the last `take()`, in GiB: of the device on CUDA, else of this process."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def take(self) -> float:
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            peak = _resident_peak()
        return peak / 2**30


def _resident_peak() -> int:
    """Bytes; since the process began where the system does not let the peak be forgotten."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", (PROCESS / "status").read_text(encoding="ascii"))
        (PROCESS / "clear_refs").write_text(RESET_PEAK, encoding="ascii")
        return int(found[1]) * 1024
    except (OSError, TypeError):  # no /proc, or no such line
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
