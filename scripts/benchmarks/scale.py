"""Weak scaling: one process and two, each with the same batch and as many threads, and what they send each other.

The module is also what each of the processes runs.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from scripts.benchmarks.runs import examples_per_second, in_processes

TASKS = ("ddpm", "text_to_image")
PROCESSES = (1, 2)


def table(pairs: int, steps: int) -> list[dict[str, Any]]:
    """A row for each task and number of processes; the efficiency is the median over pairs of runs in turns."""
    threads = max(torch.get_num_threads() // max(PROCESSES), 1)
    rows = []
    for task in TASKS:
        found: dict[int, list[dict[str, float]]] = {number: [] for number in PROCESSES}
        for pair in range(pairs):
            for number in PROCESSES if pair % 2 == 0 else reversed(PROCESSES):
                found[number].append(launched(task, number, steps, threads))
        rows += [_row(task, number, threads, runs, found[1]) for number, runs in found.items()]
    return rows


def _row(task: str, processes: int, threads: int, runs: list[dict], alone: list[dict]) -> dict[str, Any]:
    rates = [run["examples_per_second"] / processes for run in runs]
    ratios = [rate / one["examples_per_second"] for rate, one in zip(rates, alone, strict=True)]
    return {
        "task": task,
        "processes": processes,
        "threads_each": threads,
        "examples_per_second_each": statistics.median(rates),
        "efficiency": statistics.median(ratios),
        "trained_mib": runs[0]["trained_bytes"] / 2**20,
        "reduced_gradients_mib_per_step": runs[0]["gradient_bytes"] / 2**20,
        "other_bytes_per_step": runs[0]["other_bytes"],
        "ratios": ratios,
    }


def launched(task: str, processes: int, steps: int, threads: int, size: str = "realistic") -> dict[str, float]:
    """What `measure` found on the first of so many processes."""
    with tempfile.TemporaryDirectory() as folder:
        in_processes("scripts.benchmarks.scale", [task, size, folder, str(steps)], processes, threads)
        return json.loads(Path(folder, "found.json").read_text(encoding="utf-8"))


def measure(task: str, size: str, folder: str, steps: int) -> None:
    from scripts.benchmarks.loop import run_of
    from trainers.engine.dry_run.sandbox import is_main

    with counted() as count:
        run = run_of(task, size, folder, steps)
        [rate] = examples_per_second(run)
    if is_main():
        by_step = {name: value / run.base.max_train_steps for name, value in count.items() if name != "trained_bytes"}
        found = {"examples_per_second": rate, "trained_bytes": count["trained_bytes"]} | by_step
        Path(folder, "found.json").write_text(json.dumps(found), encoding="utf-8")


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Bytes that this process gives to reductions inside: those of gradients, all others, and what the weights have."""
    from trainers.engine.optim import networks

    count = {"gradient_bytes": 0, "other_bytes": 0, "trained_bytes": 0}
    prepare, all_reduce = networks.prepare_networks, dist.all_reduce

    def counting_hook(state, bucket):  # torch compares annotations, and does not read ones that are texts
        count["gradient_bytes"] += bucket.buffer().nbytes
        count["other_bytes"] -= bucket.buffer().nbytes  # the hook calls all_reduce itself
        return allreduce_hook(None, bucket)

    def prepare_and_hook(accelerator: Any, trainer: Any, *rest: Any) -> Any:
        optimizer = prepare(accelerator, trainer, *rest)
        for module in trainer.modules.values():
            count["trained_bytes"] += sum(p.nbytes for p in module.parameters() if p.requires_grad)
            if isinstance(module, DistributedDataParallel):
                module.register_comm_hook(None, counting_hook)
        return optimizer

    def counting_all_reduce(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        count["other_bytes"] += tensor.nbytes
        return all_reduce(tensor, *arguments, **options)

    with (
        patch.object(networks, "prepare_networks", prepare_and_hook),
        patch.object(dist, "all_reduce", counting_all_reduce),
    ):
        yield count


if __name__ == "__main__":
    measure(*sys.argv[1:4], int(sys.argv[4]))
