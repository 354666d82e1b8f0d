"""Prints the number of threads with which a small network trains fastest on this machine right now."""

from __future__ import annotations

import os
import timeit

import torch
from torch import nn


def seconds_per_step(threads: int, steps: int = 6) -> float:
    """The best of several steps, so that a brief disturbance does not decide."""
    torch.set_num_threads(threads)
    network = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.SiLU(), *[nn.Conv2d(32, 32, 3, padding=1) for _ in range(6)]
    )
    step = "network(torch.randn(32, 1, 16, 16)).square().mean().backward()"
    return min(timeit.repeat(step, globals={"network": network, "torch": torch}, number=1, repeat=steps))


if __name__ == "__main__":
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    candidates = sorted({1, max(cores // 2, 1), min(cores, 16)})
    print(min(candidates, key=seconds_per_step))
