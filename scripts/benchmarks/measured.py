"""What a process of a run holds and sends, counted inside of train(); each of the processes runs this module."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from psutil import Process

from scripts.benchmarks.runs import ROOT, configured, examples_per_second
from scripts.benchmarks.watching import Messages, gradients_of, held, loopback_bytes, states, watch
from trainers.engine.config.config import RunConfig
from trainers.engine.dry_run.sandbox import is_main
from trainers.engine.optim import networks
from trainers.engine.optim import optimizer as optimization
from trainers.engine.optim.ema import EMA

# so that of a small network, too, nothing but the smallest weights stays whole
ZERO_3 = {
    "stage": 3, "stage3_param_persistence_threshold": 100, "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0,
}  # fmt: skip
ENGINES = {  # how many processes, and the faults of tests/helpers/faulty.py by which the engine runs on CPUs
    "one process": (1, {}),
    "DDP": (2, {}),
    "FSDP2": (2, {"fsdp": {}}),
    "ZeRO-2": (2, {"deepspeed": {"stage": 2}}),
    "ZeRO-3": (2, {"deepspeed": ZERO_3}),
}
CONFIGS = {"ddpm": "configs/ddpm_digits.yaml", "dit": "configs/dit_digits.yaml"}
WARM_STEPS = 3  # the last of them is looked into, which takes time
SMALL, LARGE = 1 << 10, 1 << 20  # numbers of the messages that are timed
NUMBER_BYTES = 4


def measure(folder: str, engine: str, task: str, steps: str, *options: str) -> dict[str, Any]:
    """Of a run of so many steps after WARM_STEPS, and one more."""
    run = _configured(folder, engine, task, steps, options)
    with observed(int(steps)) as found:
        examples_per_second(run)
    return found


def restart(folder: str, engine: str, task: str, steps: str, *options: str) -> float:
    """Seconds from the start of this process to the first step of that run when it goes on from its checkpoint."""
    again = "base.resume_from_checkpoint=latest", f"base.max_train_steps={WARM_STEPS + int(steps) + 2}"
    run, began, starts = _configured(folder, engine, task, steps, [*options, *again]), Process().create_time(), []
    original = optimization.set_learning_rates

    def begin(*arguments: Any) -> Any:
        starts.append(time.time())
        return original(*arguments)

    with patch.object(optimization, "set_learning_rates", begin):
        examples_per_second(run)
    return starts[0] - began


def _configured(folder: str, engine: str, task: str, steps: str, options: Sequence[str]) -> RunConfig:
    sys.path.append(str(ROOT / "tests" / "helpers"))
    import faulty

    for fault, settings in ENGINES[engine][1].items():
        getattr(faulty, fault)(settings)
    return configured(CONFIGS[task], folder, WARM_STEPS + int(steps) + 1, list(options), windows=0)


@contextmanager
def observed(steps: int) -> Iterator[dict[str, Any]]:
    """Fills what is found with bytes that this process holds and gives to messages in a step, both processes' bytes on
    the wire and seconds of a step, medians or means of so many.
    """
    found: dict[str, Any] = {}
    starts: list[float] = []
    messages, wire = Messages(), []
    originals = networks.prepare_networks, optimization.set_learning_rates, optimization.optimizer_step, EMA.update

    def prepare(accelerator: Any, trainer: Any, *rest: Any) -> Any:
        optimizer = originals[0](accelerator, trainer, *rest)
        for module in trainer.modules.values():
            watch(module, lambda: len(starts) == WARM_STEPS, found)
        found["modules"] = list(trainer.modules.values())
        return optimizer

    def begin(*arguments: Any) -> Any:
        if len(starts) == WARM_STEPS:
            messages.__exit__(None, None, None)
        if len(starts) in (WARM_STEPS, WARM_STEPS + steps):
            wire.append(loopback_bytes())
        starts.append(time.perf_counter())
        if len(starts) == WARM_STEPS:
            messages.__enter__()
        return originals[1](*arguments)

    def update(accelerator: Any, optimizer: Any, *rest: Any) -> Any:
        looked_into = len(starts) == WARM_STEPS
        gradient_bytes = held(gradients_of(optimizer)) if looked_into else 0
        result = originals[2](accelerator, optimizer, *rest)
        if looked_into:
            found["held"] = states(found.pop("modules"), optimizer) | {"averages": 0, "gradients": gradient_bytes}
        return result

    def average(ema: EMA, *arguments: Any) -> None:
        if len(starts) == WARM_STEPS:
            found["held"]["averages"] = held(list(ema.averages.values()))
        originals[3](ema, *arguments)

    with ExitStack() as patches:
        patches.enter_context(patch.object(networks, "prepare_networks", prepare))
        patches.enter_context(patch.object(optimization, "set_learning_rates", begin))
        patches.enter_context(patch.object(optimization, "optimizer_step", update))
        patches.enter_context(patch.object(EMA, "update", average))
        yield found
    timed = starts[WARM_STEPS : WARM_STEPS + steps + 1]
    found["step_seconds"] = statistics.median(b - a for a, b in pairwise(timed))
    found["messages"], found["wire"] = messages.found, (wire[1] - wire[0]) / steps


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
    calls = {
        "all_reduce": lambda: dist.all_reduce(whole),
        "all_gather": lambda: dist.all_gather_into_tensor(whole, own),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(own, whole),
    }
    times = []
    for _ in range(repetitions):
        dist.barrier()
        began = time.perf_counter()
        calls[kind]()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


if __name__ == "__main__":
    torch.set_num_threads(1)
    result = {"measure": measure, "restart": restart, "links": links}[sys.argv[1]](*sys.argv[2:])
    if is_main():
        Path(sys.argv[2], "found.json").write_text(json.dumps(result), encoding="utf-8")
