"""train() beside a bare PyTorch loop on the card, at sizes that people train; random weights, pictures of noise.

Memory is that of the run alone, before the bare loop begins. A share of the peak: of the FLOPs that torch counts in a
bare step, as the data sheet has it.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, cast

from torch.utils.flop_counter import FlopCounterMode

from scripts.benchmarks.loop import bare_step, denoising_loss
from scripts.benchmarks.on_gpu.machine import free_memory, peak_flops
from scripts.benchmarks.on_gpu.section import Asked, Case, if_it_fits
from scripts.benchmarks.on_gpu.shapes import Shape, real_shapes, saving_shape, tiny_shapes
from scripts.benchmarks.plain import plain_step
from scripts.benchmarks.runs import (
    Enough,
    beside,
    configured,
    examples_per_second,
    logged,
    median_ratio,
    synchronize,
)
from trainers.base import Trainer
from trainers.engine.config.config import RunConfig

WINDOWS = 3  # that are compared, after one to warm up
RATIO = 0.98  # of the loop, that is aimed at
BLOCKS = ["base.compile=true", "base.compile_repeated_blocks=true"]


def cases(asked: Asked) -> dict[str, Case]:
    shapes = tiny_shapes() if asked.tiny else real_shapes(asked)
    found: dict[str, Case] = {name: partial(measured, asked, name, shape) for name, shape in shapes.items()}
    ddpm = next(iter(shapes))
    found[f"{ddpm}, beside a plain script"] = partial(beside_plain, asked, ddpm, shapes[ddpm])
    found["a save of the whole fine-tune"] = partial(stall, asked, saving_shape(asked.tiny))
    if not asked.tiny:
        for name, compiled in (("LoRA SD 1.5, batch 1", BLOCKS), (ddpm, ["base.compile=true"])):
            shape = shapes[name]._replace(options=partial(_with, shapes[name].options, compiled))
            found[f"{name}, compiled"] = partial(measured, asked, f"{name} compiled", shape)
    return {name: partial(if_it_fits, case) for name, case in found.items()}


def _with(options: Callable[[], list[str]], more: list[str]) -> list[str]:
    return [*options(), *more]


def run_of(asked: Asked, name: str, shape: Shape) -> RunConfig:
    windows = 1 if asked.tiny else WINDOWS
    return configured(shape.config, asked.run_folder(name), shape.window, shape.options(), windows)


def measured(asked: Asked, name: str, shape: Shape) -> dict[str, Any]:
    run, flops = run_of(asked, name, shape), [0]

    def bare(trainer: Trainer) -> Callable[[], None]:
        with FlopCounterMode(display=False) as counter:  # of an eager step: it cannot see into compiled code
            bare_step(run._replace(base=replace(run.base, compile=False)), trainer)()
        flops[0] = counter.get_total_flops()
        free_memory()
        return bare_step(run, trainer)

    rates = beside(run, {"bare": bare})
    rate, memory = statistics.median(rates["diffloop"]), logged(run, "peak_memory_gib")[0]
    row: dict[str, Any] = {
        "images_per_second": rate,
        "bare_images_per_second": statistics.median(rates["bare"]),
        "loop_ratio": median_ratio(rates["diffloop"], rates["bare"]),
        "steps": len(rates["diffloop"]) * shape.window,
        "memory_gib": memory,
    }
    peak = peak_flops()
    if peak is not None:
        row["share_of_peak"] = rate / run.base.train_batch_size * flops[0] / peak
    aims = [(f"ratio >= {RATIO}", row["loop_ratio"] >= RATIO)]
    if shape.aim is not None:
        aims.append((f">= {shape.aim[0]:g} images/s", rate >= shape.aim[0]))
        if math.isfinite(shape.aim[1]):
            aims.append((f"<= {shape.aim[1]:g} GiB", memory <= shape.aim[1]))
    return row | {"aims": "; ".join(f"{aim}: {'met' if met else 'missed'}" for aim, met in aims)}


def beside_plain(asked: Asked, name: str, shape: Shape) -> dict[str, Any]:
    """The same network in a script in the style of diffusers' examples, in float32 and in bf16."""
    run = run_of(asked, f"{name} plain", shape)

    def plain(precision: str, trainer: Trainer) -> Callable[[], None]:
        [network] = trainer.unwrapped.values()
        made = cast(Any, type(network)).from_config(cast(Any, network).config)
        return plain_step(made.to(trainer.device).train(), denoising_loss(trainer, made), precision)

    rates = beside(run, {precision: partial(plain, precision) for precision in ("no", "bf16")})
    times = {precision: median_ratio(rates["diffloop"], rates[precision]) for precision in ("no", "bf16")}
    met = "met" if times["no"] >= 3 else "missed"
    return {
        "images_per_second": statistics.median(rates["diffloop"]),
        "note": f"{times['no']:.2f} times the plain script in float32, {times['bf16']:.2f} times the one in bf16",
        "aims": f"3 times the plain script: {met}",
    }


def stall(asked: Asked, shape: Shape) -> dict[str, Any]:
    """The step with the second save after it, less a normal step; the first one pays for the memory of the copy."""
    period, ends = shape.window, list[float]()
    run = run_of(
        asked, "stall", shape._replace(options=partial(_with, shape.options, ["base.checkpoints_total_limit=1"]))
    )
    run.base.checkpointing_steps, run.base.max_train_steps = period, 3 * period

    def look(validation: Any, steps_done: int) -> None:
        synchronize()
        ends.append(time.perf_counter())
        if steps_done == period:
            validation.saver.wait()
            ends[-1] = time.perf_counter()
        if steps_done == 2 * period + 1:
            raise Enough

    examples_per_second(run, look)
    seconds = [after - before for before, after in pairwise(ends)]  # of each step, from 1 on
    normal, saving = statistics.median(seconds[period : 2 * period - 1]), seconds[2 * period - 1]
    stalled = f"a stall of {saving / normal - 1:.2f} steps"
    return {
        "note": f"a step takes {normal:.3f} s, the one with a save {saving:.3f} s: {stalled}",
        "aims": f"less than a step: {'met' if saving < 2 * normal else 'missed'}",
    }
