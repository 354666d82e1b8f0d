"""Means over the steps since the last log line, kept on the device so that a step needs no synchronisation."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor


class Meter:
    """Sums and counts by name; what is not finite is left out, so that one skipped step does not hide a window."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.sums: dict[str, Tensor] = {}  # [2]: sum, count

    @torch.no_grad()
    def add(self, values: dict[str, Tensor]) -> None:
        found = torch.stack([value.detach().float() for value in values.values()])
        finite = found.isfinite()
        pairs = torch.stack([torch.where(finite, found, 0.0), finite.float()], dim=1)
        for name, pair in zip(values, pairs.unbind(), strict=True):
            self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    def means(self) -> dict[str, float]:
        """The means over all processes, and a new window. Collective; the one synchronisation of a log line."""
        if not self.sums:
            return {}
        sums = self.accelerator.reduce(torch.stack(list(self.sums.values())), "sum").tolist()
        names = list(self.sums)
        self.sums = {}
        return {name: total / count if count else math.nan for name, (total, count) in zip(names, sums, strict=True)}

    def state(self) -> dict[str, list]:
        """The open window of every process, [process, name, 2]: a resumed run logs the same bits. Collective."""
        if not self.sums:
            return {}
        windows = self.accelerator.gather(torch.stack(list(self.sums.values()))[None])
        return {"names": list(self.sums), "windows": windows.tolist()}

    def load(self, state: dict[str, list]) -> None:
        """Takes up a saved window; with another number of processes the first one gets the sum."""
        windows = torch.tensor(state.get("windows", []), device=self.accelerator.device)
        if not len(windows):
            return
        rank = self.accelerator.process_index
        if len(windows) == self.accelerator.num_processes:
            mine = windows[rank]
        else:
            mine = windows.sum(0) if rank == 0 else torch.zeros_like(windows[0])
        self.sums = dict(zip(state["names"], mine, strict=True))


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

    def examples_per_second(self) -> float:
        """The rate since the last call."""
        rate = self.examples / max(time.perf_counter() - self.since - self.pauses, 1e-9)
        self.start()
        return rate
