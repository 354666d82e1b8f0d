"""train() beside a bare PyTorch loop on the card, at sizes that people train; random weights, pictures of noise.

Memory is that of the run alone, before the bare loop begins. A share of the peak: of the FLOPs that torch counts in a
bare step, as the data sheet has it.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, cast

from torch.utils.flop_counter import FlopCounterMode

from scripts.benchmarks.bases import stable_diffusion
from scripts.benchmarks.loop import bare_step, denoising_loss
from scripts.benchmarks.on_gpu.machine import free_memory, peak_flops
from scripts.benchmarks.on_gpu.pictures import DATASET
from scripts.benchmarks.on_gpu.section import Asked, Case, if_it_fits
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
DIT_XL_2 = {"patch_size": 2, "num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72}
RATIO = 0.98  # of the loop, that is aimed at
BF16 = ["base.mixed_precision=bf16"]
BLOCKS = ["base.compile=true", "base.compile_repeated_blocks=true"]


class Shape(NamedTuple):
    """A run to measure: its config, options, and the steps of a window."""

    config: str
    options: Callable[[], list[str]]  # which may make the base model
    window: int
    aim: tuple[float, float] | None = None  # images per second at least, GiB at most


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


def tiny_shapes() -> dict[str, Shape]:
    return {
        "DDPM": Shape("configs/tests/ddpm.json", lambda: BF16, 2),
        "LoRA": Shape("configs/tests/lora.json", partial(lora_options, "smallest", 32, 2), 2),
    }


def real_shapes(asked: Asked) -> dict[str, Shape]:
    """The first is the one of CIFAR-10, which is compared with a plain script too."""
    dit = asked.folder / "dit_xl_2.json"
    dit.write_text(json.dumps(DIT_XL_2), encoding="utf-8")
    cifar = [*pictures(10_000, 32), *BF16, "ddpm.model_config=unet_cifar10", "base.train_batch_size=128"]
    latents = [*pictures(2_000, 32, channels=4, classes=1000), *BF16, f"dit.model_config={dit}"]
    latents += ["base.train_batch_size=64"]
    lora, whole = "configs/tests/lora.json", "configs/tests/text_to_image.json"
    return {
        "DDPM of CIFAR-10's shape, batch 128": Shape("configs/tests/ddpm.json", lambda: cifar, 30),
        "LoRA SD 1.5, batch 1": Shape(lora, partial(lora_options, "whole", 512, 1), 20, (11.0, 3.0)),
        "LoRA SD 1.5, batch 4": Shape(lora, partial(lora_options, "whole", 512, 4), 12),
        "fine-tune SD 1.5, batch 16": Shape(whole, partial(whole_options, 16), 6),
        "fine-tune SD 1.5, batch 32": Shape(whole, partial(whole_options, 32), 4, (75.0, math.inf)),
        "DiT-XL/2 at 256 px (its latents), batch 64": Shape("configs/tests/dit.json", lambda: latents, 8),
        "LoRA SDXL 1024 px, batch 1": Shape(lora, partial(lora_options, "whole xl", 1024, 1), 8),
    }


def saving_shape(tiny: bool) -> Shape:
    options = partial(whole_options, 2, "smallest", 32) if tiny else partial(whole_options, 32)
    return Shape("configs/tests/text_to_image.json", options, 6)


def pictures(count: int, resolution: int, channels: int = 3, classes: int = 0) -> list[str]:
    return [
        f"base.dataset={DATASET}", f"base.dataset_args={{count: {count}, classes: {classes}}}",
        "base.max_train_samples=null", f"base.resolution={resolution}", f"base.channels={channels}",
    ]  # fmt: skip


def lora_options(size: str, resolution: int, batch: int) -> list[str]:
    """Adapters of rank 16 in the UNet alone, everything cached."""
    return [
        *pictures(8, resolution), *BF16, *cached("lora"), f"base.train_batch_size={batch}", "lora.rank=16",
        "lora.train_text_encoder=false", "lora.learning_rate=1e-4", "lora.lora_dropout=0", "lora.snr_gamma=null",
        "lora.caption_dropout=0", "lora.use_ema=false", f"lora.pretrained_model_name_or_path={stable_diffusion(size)}",
    ]  # fmt: skip


def whole_options(batch: int, size: str = "whole", resolution: int = 512) -> list[str]:
    return [
        *pictures(8, resolution), *BF16, *cached("text_to_image"), f"base.train_batch_size={batch}",
        "text_to_image.caption_dropout=0", "text_to_image.noise_offset=0",
        f"text_to_image.pretrained_model_name_or_path={stable_diffusion(size)}",
    ]  # fmt: skip


def cached(task: str) -> list[str]:
    return ["base.center_crop=true", f"{task}.cache_latents=memory", f"{task}.cache_text=memory"]


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
