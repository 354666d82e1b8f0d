"""The most memory that was in use since the last look: of the device on CUDA, elsewhere of this process."""

from __future__ import annotations

import re
import resource
from pathlib import Path

import torch

PROCESS = Path("/proc/self")
RESET_PEAK = "5"  # what clear_refs takes for "forget the highest resident size"


class PeakMemory:
    """`take()` answers for the time since it was asked last, in GiB, without waiting for the device."""

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
