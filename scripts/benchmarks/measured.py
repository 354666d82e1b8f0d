"""Counts what a process of a run holds and sends, inside train(); each of the processes runs this module."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

from psutil import Process

from scripts.benchmarks.loop import run_of
from scripts.benchmarks.runs import examples_per_second, from_tests
from scripts.benchmarks.watching import Messages, activations, gradients_of, held, loopback_bytes, memory_of, states
from trainers.engine.config.config import RunConfig
from trainers.engine.dry_run.sandbox import is_main
from trainers.engine.optim import optimizer as optimization
from trainers.engine.validation.validation import Validation

# so that of a small network, too, nothing but the smallest weights stays whole
ZERO_3 = {
    "stage": 3, "stage3_param_persistence_threshold": 100, "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0,
}  # fmt: skip
# the number of processes, and the faults of tests/helpers/faulty.py with which the engine runs on CPUs
ENGINES: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "DDP": (2, {}),
    "FSDP2": (2, {"fsdp": {}}),
    "ZeRO-2": (2, {"deepspeed": {"stage": 2}}),
    "ZeRO-3": (2, {"deepspeed": ZERO_3}),
}
WARM_STEPS = 3  # the last of them is looked into, which takes time


def measure(folder: str, engine: str, task: str, steps: str, *options: str) -> dict[str, Any]:
    """Bytes that this process holds and exchanges in a step, bytes of all on the wire, and seconds of a step.

    The last two are the mean and the median of `steps` steps after WARM_STEPS.
    """
    found: dict[str, Any] = {}
    times: list[float] = []  # of the start, and of the end of each step
    last = WARM_STEPS + int(steps)
    wire, messages, looking, step = [], Messages(), ExitStack(), optimization.optimizer_step
    run = _configured(folder, engine, task, steps, options)

    def look(validation: Validation, steps_done: int) -> None:
        state, modules = validation.saver.state, validation.trainer.modules.values()
        if steps_done == WARM_STEPS:
            looking.close()
            found["held"] |= states(modules, state.optimizer, state.ema)
        if steps_done in (WARM_STEPS, last):
            wire.append(loopback_bytes())
        times.append(time.perf_counter())
        if steps_done == WARM_STEPS - 1:
            for module in modules:
                looking.enter_context(activations(module, found))
            looking.enter_context(messages)

    def look_and_step(accelerator: Any, optimizer: Any, *rest: Any) -> Any:
        if len(times) == WARM_STEPS:
            bytes_of = memory_of if engine == "DDP" else held  # DDP's lie in its buckets
            found["held"] = {"gradients": bytes_of(gradients_of(optimizer))}
        return step(accelerator, optimizer, *rest)

    with patch.object(optimization, "optimizer_step", look_and_step):
        examples_per_second(run, look)
    return found | {
        "messages": messages.num_bytes,
        "wire": (wire[1] - wire[0]) / int(steps),
        "step_seconds": statistics.median(b - a for a, b in pairwise(times[WARM_STEPS : last + 1])),
        "batch": run.base.train_batch_size,
    }


def restart(folder: str, engine: str, task: str, steps: str, *options: str) -> float:
    """Seconds from the start of this process to its first step, when it resumes the run that `measure` made."""
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


if __name__ == "__main__":
    function, own_folder = sys.argv[1:3]
    functions: dict[str, Any] = {"measure": measure, "restart": restart}
    result = functions[function](*sys.argv[2:])
    if is_main():
        Path(own_folder, "found.json").write_text(json.dumps(result), encoding="utf-8")
