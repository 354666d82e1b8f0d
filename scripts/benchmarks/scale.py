"""Weak scaling: one process and two, each with the same batch and as many threads, and what they send each other."""

from __future__ import annotations

import argparse
import statistics
import tempfile
from functools import partial
from typing import Any

import torch

from scripts.benchmarks.loop import run_of
from scripts.benchmarks.runs import in_processes, in_turns

TASKS = ("ddpm", "text_to_image")
ENGINES = {1: "one process", 2: "DDP"}


def tables(asked: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """A row for each task and number of processes; the efficiency is the median over pairs of runs in turns."""
    threads = max(torch.get_num_threads() // max(ENGINES), 1)
    rows = []
    for task in TASKS:
        sides = {number: partial(launched, task, number, asked.steps, threads) for number in ENGINES}
        found = in_turns(sides, asked.pairs)
        rows += [row(task, number, threads, runs, found[1]) for number, runs in found.items()]
    return {"scale": rows}


def row(task: str, processes: int, threads: int, runs: list[dict], alone: list[dict]) -> dict[str, Any]:
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


def launched(task: str, processes: int, steps: int, threads: int) -> dict[str, float]:
    """The rate of a run of so many processes, and the bytes that the first one gives to reductions in a step."""
    with tempfile.TemporaryDirectory() as folder:
        batch = run_of(task, "realistic", folder, steps).base.train_batch_size
        given = ["measure", folder, ENGINES[processes], task, str(steps)]
        found = in_processes("scripts.benchmarks.measured", given, folder, processes, threads)
    gradients = found["held"]["gradients in flight"] or 0
    return {
        "examples_per_second": processes * batch / found["step_seconds"],
        "trained_bytes": found["held"]["weights"],
        "gradient_bytes": gradients,
        "other_bytes": sum(num_bytes for _, num_bytes in found["messages"].values()) - gradients,
    }
