"""Weak scaling: one process and two, each with the same batch and as many threads, and what they send each other."""

from __future__ import annotations

import argparse
import statistics
import tempfile
from functools import partial
from typing import Any

import torch

from scripts.benchmarks.engines import MIB, launched
from scripts.benchmarks.measured import ENGINES
from scripts.benchmarks.runs import in_turns

TASKS = ("ddpm", "text_to_image")
ALONE, TOGETHER = "one process", "DDP"


def rows(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each task and number of processes; the efficiency is the median over pairs of runs in turns."""
    threads = max(torch.get_num_threads() // ENGINES[TOGETHER][0], 1)
    found = []
    for task in TASKS:
        sides = {engine: partial(run, engine, task, asked.steps, threads) for engine in (ALONE, TOGETHER)}
        by_engine = in_turns(sides, asked.pairs)
        for engine, runs in by_engine.items():
            named = {"task": task, "processes": ENGINES[engine][0], "threads_each": threads}
            found.append(named | row(runs, by_engine[ALONE]))
    return found


def run(engine: str, task: str, steps: int, threads: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return launched("measure", folder, engine, task, steps, threads=threads)


def row(runs: list[dict[str, Any]], alone: list[dict[str, Any]]) -> dict[str, Any]:
    first = runs[0]
    gradients = first["held"]["gradients"] if first["messages"] else 0  # which are reduced once
    ratios = [one["step_seconds"] / run["step_seconds"] for run, one in zip(runs, alone, strict=True)]
    return {
        "examples_per_second_each": statistics.median(run["batch"] / run["step_seconds"] for run in runs),
        "efficiency": statistics.median(ratios),
        "trained_mib": first["held"]["weights"] / MIB,
        "reduced_gradients_mib_per_step": gradients / MIB,
        "other_bytes_per_step": sum(first["messages"].values()) - gradients,
        "ratios": ratios,
    }
