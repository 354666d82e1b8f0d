"""Whether every task computes on the card what it does on the CPU, resumes exactly, and meets faults as it should."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch import Tensor

from scripts.benchmarks.on_gpu import ways
from scripts.benchmarks.on_gpu.section import Asked, Case
from scripts.benchmarks.on_gpu.tiny_runs import (
    OTHER_KERNELS,
    STEPS,
    TASKS,
    TinyRuns,
    bounded,
    difference,
    losses,
    on_cpu,
    sums,
)
from scripts.benchmarks.runs import from_tests
from trainers.engine.checkpoint.manifest import list_checkpoints
from trainers.engine.config.errors import Interrupted
from trainers.engine.optim import optimizer
from trainers.engine.optim.nonfinite import NonFiniteSteps
from trainers.engine.run import context
from trainers.engine.run.run_folder import SKIPPED_STEPS, read_lines

TINY_TASKS: tuple[str, ...] = ("ddpm", "lora")
# of the losses of 8 steps, relative to their mean
BOUNDS = {"no": 1e-4, "bf16": 1e-2, "fp16": 2e-3}  # 1,000, 3 and 4 times what one rounding changes
# its targets are the network's own predictions, so that a rounding grows with the steps: on a CPU to 0.09, from 0.003
LCM_BF16 = 0.2
STARTING_SCALE = 2.0**28  # of fp16's losses: overflows for some steps, which a run must not take for faults


def cases(asked: Asked) -> dict[str, Case]:
    runs = TinyRuns(asked.folder)
    found: dict[str, Case] = {}
    tasks = TINY_TASKS if asked.tiny else TASKS
    plain = cache(partial(_on_cpu, runs))
    for task in tasks:
        found[f"{task}: float32 beside the CPU"] = partial(beside_cpu, runs, plain, task, "no")
    for task in tasks:
        found[f"{task}: exact resume, deterministic"] = partial(exact_resume, runs, task)
    for task in tasks:
        found[f"{task}: bf16 beside the CPU's float32"] = partial(beside_cpu, runs, plain, task, "bf16")
    found["a NaN is skipped and written down"] = partial(nan, runs)
    found["TERM in the middle saves"] = partial(term, runs)
    if asked.device == "cuda":  # accelerate has no fp16 without a card
        found |= {
            f"{task}: fp16, overflows told from faults": partial(fp16, runs, plain, task) for task in ("ddpm", "lora")
        }
    for task in ("ddpm", "lora"):
        found[f"{task}: resume, not deterministic: same data and draws"] = partial(same_data, runs, task)
    return found | ways.cases(asked, runs)


def _on_cpu(runs: TinyRuns, task: str) -> list[float]:
    with on_cpu():
        return runs.losses(task, f"{task}-cpu", **runs.without_dropout(task))


def beside_cpu(runs: TinyRuns, plain: Callable[[str], list[float]], task: str, precision: str) -> dict[str, Any]:
    options = runs.without_dropout(task) | {"base.mixed_precision": precision}
    found = runs.losses(task, f"{task}-{precision}", **options)
    bound = LCM_BF16 if (task, precision) == ("lcm_lora", "bf16") else BOUNDS[precision]
    return bounded(difference(found, plain(task)), bound)


def exact_resume(runs: TinyRuns, task: str) -> dict[str, Any]:
    """Compares losses and the last checkpoint's files, bit by bit."""
    whole, cut = cut_and_resumed(runs, task, True)
    final_state = from_tests("run_folders").final_state
    same = losses(cut) == losses(whole) and final_state(cut, STEPS) == final_state(whole, STEPS)
    return {"difference": difference(losses(cut), losses(whole)), "bound": 0.0, "holds": same}


def same_data(runs: TinyRuns, task: str) -> dict[str, Any]:
    whole, cut = cut_and_resumed(runs, task, False)
    return bounded(difference(losses(cut), losses(whole)), OTHER_KERNELS)


def cut_and_resumed(runs: TinyRuns, task: str, deterministic: bool) -> tuple[Path, Path]:
    name, half = f"{task}-{deterministic}", STEPS // 2
    options = {"base.deterministic": deterministic, "base.checkpointing_steps": half, "base.random_flip": True}
    whole = runs.train(task, name, **options)
    cut = Path(shutil.copytree(whole, whole.with_name(f"{name}-cut")))
    from_tests("run_folders").forget_after(cut, half)
    runs.train(task, cut.name, **options, **{"base.resume_from_checkpoint": "latest"})
    return whole, cut


def nan(runs: TinyRuns) -> dict[str, Any]:
    with patch.object(NonFiniteSteps, "poison_if_nonfinite", nan_in_call(3)):
        folder = runs.train("ddpm", "nan")
    steps = [line["step"] for line in read_lines(folder / SKIPPED_STEPS)]
    return {"holds": steps == [3] and sums(folder, "skipped") == 1, "note": f"skipped: {steps}"}


def nan_in_call(number: int) -> Callable[[NonFiniteSteps, Tensor], Tensor]:
    original, calls = NonFiniteSteps.poison_if_nonfinite, [0]

    def broken(self: NonFiniteSteps, loss: Tensor) -> Tensor:
        calls[0] += 1
        return original(self, loss * float("nan") if calls[0] == number else loss)

    return broken


def term(runs: TinyRuns) -> dict[str, Any]:
    """Sends TERM in step 3, then resumes; the losses are those of a run that was not stopped."""
    original, calls = optimizer.optimizer_step, [0]

    def stopped(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    options = {"base.deterministic": True}
    try:
        with patch.object(optimizer, "optimizer_step", stopped):
            runs.train("ddpm", "term", **options)
        code = 0
    except Interrupted as interruption:
        code = interruption.code
    steps = [step for step, _ in list_checkpoints(runs.folder / "term")]
    resumed = runs.losses("ddpm", "term", **options, **{"base.resume_from_checkpoint": "latest"})
    same = resumed == runs.losses("ddpm", "not-stopped", **options)
    return {"holds": (code, steps, same) == (143, [3], True), "note": f"exit code {code}, saved {steps}"}


def fp16(runs: TinyRuns, plain: Callable[[str], list[float]], task: str) -> dict[str, Any]:
    """A scale that overflows at first, and a NaN in step 2, which alone counts as a fault.

    After the skipped steps the weights are those of fewer steps, so that the losses are compared in a run with
    the usual scale.
    """
    options = runs.without_dropout(task) | {"base.mixed_precision": "fp16"}
    found = difference(runs.losses(task, f"{task}-fp16", **options), plain(task))
    original = context.start_accelerator

    def scaled(base: Any) -> Any:
        accelerator = original(base)
        accelerator.scaler._init_scale = STARTING_SCALE
        return accelerator

    with (
        patch.object(context, "start_accelerator", scaled),
        patch.object(NonFiniteSteps, "poison_if_nonfinite", nan_in_call(2)),
    ):
        folder = runs.train(task, f"{task}-fp16-overflow", **options, **{"base.max_train_steps": 3 * STEPS})
    faults, overflows = sums(folder, "skipped"), sums(folder, "scaler_skipped")
    row = bounded(found, BOUNDS["fp16"])
    row["holds"] = row["holds"] and faults == 1 and 0 < overflows < 3 * STEPS - 2
    return row | {"note": f"{overflows} overflows, {faults} fault"}
