"""Counts what a process of a run holds and sends, inside train(); each of the processes runs this module."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from psutil import Process

from scripts.benchmarks.loop import run_of
from scripts.benchmarks.runs import examples_per_second, from_tests, seconds_of
from scripts.benchmarks.watching import Messages, gradients_of, held, loopback_bytes, states, watch
from trainers.engine.config.config import RunConfig
from trainers.engine.dry_run.sandbox import is_main
from trainers.engine.optim import optimizer as optimization
from trainers.engine.validation.validation import Validation

# so that of a small network, too, nothing but the smallest weights stays whole
ZERO_3 = {
    "stage": 3, "stage3_param_persistence_threshold": 100, "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0,
}  # fmt: skip
ENGINES: dict[
    str, tuple[int, dict[str, Any]]
] = {  # how many processes, and the faults of tests/helpers/faulty.py by which the engine runs on CPUs
    "one process": (1, {}),
    "DDP": (2, {}),
    "FSDP2": (2, {"fsdp": {}}),
    "ZeRO-2": (2, {"deepspeed": {"stage": 2}}),
    "ZeRO-3": (2, {"deepspeed": ZERO_3}),
}
WARM_STEPS = 3  # the last of them is looked into, which takes time
SMALL, LARGE = 1 << 10, 1 << 20  # numbers of the messages that are timed
NUMBER_BYTES = 4


def measure(folder: str, engine: str, task: str, steps: str, *options: str) -> dict[str, Any]:
    """Bytes that this process holds and exchanges in a step, all processes' bytes on the wire, and seconds of a step.

    The last two are the mean and the median of so many steps after WARM_STEPS.
    """
    found: dict[str, Any] = {}
    times: list[float] = []  # of the start, and of the end of each step
    wire, messages, step = [], Messages(), optimization.optimizer_step

    def look(validation: Validation, steps_done: int) -> None:
        state, modules = validation.saver.state, validation.trainer.modules.values()
        if steps_done == WARM_STEPS:
            messages.__exit__(None, None, None)
            for hooks in found.pop("hooks"):
                hooks.close()
            found["held"] |= states(modules, state.optimizer, state.ema)
        if steps_done in (WARM_STEPS, WARM_STEPS + int(steps)):
            wire.append(loopback_bytes())
        times.append(time.perf_counter())
        if steps_done == WARM_STEPS - 1:
            found["hooks"] = [watch(module, found) for module in modules]
            messages.__enter__()

    def look_and_step(accelerator: Any, optimizer: Any, *rest: Any) -> Any:
        if len(times) == WARM_STEPS:
            found["held"] = {"gradients": held(gradients_of(optimizer))}
        return step(accelerator, optimizer, *rest)

    with patch.object(optimization, "optimizer_step", look_and_step):
        examples_per_second(_configured(folder, engine, task, steps, options), look)
    timed = times[WARM_STEPS : WARM_STEPS + int(steps) + 1]
    seconds = statistics.median(b - a for a, b in pairwise(timed))
    return found | {"messages": messages.found, "wire": (wire[1] - wire[0]) / int(steps), "step_seconds": seconds}


def restart(folder: str, engine: str, task: str, steps: str, *options: str) -> float:
    """Seconds from the start of this process to the first step of that run when it goes on from its checkpoint."""
    again = "base.resume_from_checkpoint=latest", f"base.max_train_steps={WARM_STEPS + int(steps) + 2}"
    times: list[float] = []
    run = _configured(folder, engine, task, steps, [*options, *again])
    examples_per_second(run, lambda validation, steps_done: times.append(time.time()))
    return times[0] - Process().create_time()


def _configured(folder: str, engine: str, task: str, steps: str, options: Sequence[str]) -> RunConfig:
    faulty = from_tests("faulty")
    for fault, settings in ENGINES[engine][1].items():
        getattr(faulty, fault)(settings)
    return run_of(task, "realistic", folder, WARM_STEPS + int(steps) + 1, windows=0, options=options)


def links(folder: str, engine: str, repetitions: str) -> dict[str, list[float]]:
    """For each kind of message its seconds, and seconds more for each byte of the whole tensor: medians."""
    dist.init_process_group("gloo")
    found = {}
    for kind in ("all_reduce", "all_gather", "reduce_scatter"):
        small, large = (_seconds(kind, numbers, int(repetitions)) for numbers in (SMALL, LARGE))
        found[kind] = [small, (large - small) / (NUMBER_BYTES * LARGE)]
    dist.destroy_process_group()
    return found


def _seconds(kind: str, numbers: int, repetitions: int) -> float:
    whole, own = torch.ones(numbers), torch.ones(numbers // dist.get_world_size())
    call = {
        "all_reduce": lambda: dist.all_reduce(whole),
        "all_gather": lambda: dist.all_gather_into_tensor(whole, own),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(own, whole),
    }[kind]
    times = []
    for _ in range(repetitions):
        dist.barrier()
        times.append(seconds_of(call, 1))
    return statistics.median(times)


if __name__ == "__main__":
    function, own_folder = sys.argv[1:3]
    functions: dict[str, Any] = {"measure": measure, "restart": restart, "links": links}
    result = functions[function](*sys.argv[2:])
    if is_main():
        Path(own_folder, "found.json").write_text(json.dumps(result), encoding="utf-8")
