"""Whether `train.py CONFIG --dry-run` says what the run then takes: peak memory within 5 %, time within 15 %."""

from __future__ import annotations

import re
import time
from functools import partial
from typing import Any

from scripts.benchmarks.on_gpu.section import Asked, Case, called
from scripts.benchmarks.on_gpu.shapes import lora_options, pictures
from trainers.engine.run.run_folder import METRICS, read_lines

MEMORY, TIME = 0.05, 0.15  # of the run's own
UNITS = {"h": 3600, "min": 60, "s": 1}
PLAIN = ["base.logger=none", "base.valid_steps=null", "base.logging_steps=10", "base.checkpointing_steps=100000"]


def cases(asked: Asked) -> dict[str, Case]:
    if asked.tiny:
        return {"DDPM": partial(compared, asked, "ddpm", ["base.max_train_steps=40"])}
    cifar = [*pictures(10_000, 32), "base.mixed_precision=bf16", "ddpm.model_config=unet_cifar10"]
    cifar += ["base.train_batch_size=128", "base.max_train_steps=100", "ddpm.valid_batch_size=16"]
    lora = ["lora.validation_prompts=[]", "base.max_train_steps=60"]
    return {
        "DDPM of CIFAR-10's shape, batch 128": partial(compared, asked, "ddpm", cifar),
        "LoRA SD 1.5, batch 4": partial(with_base, asked, lora),
    }


def with_base(asked: Asked, options: list[str]) -> dict[str, Any]:
    return compared(asked, "lora", [*lora_options("whole", 512, 4), *options])


def compared(asked: Asked, task: str, options: list[str]) -> dict[str, Any]:
    folder = asked.folder / task
    arguments = [f"configs/tests/{task}.json", f"base.output_dir={folder}", *PLAIN, *options]
    text = called(asked, "train.py", "--dry-run", *arguments)
    said = {name: float(gib) for name, gib in re.findall(r"^  (\w+) +([\d.]+) GiB$", text, re.MULTILINE)}
    parts = re.search(r"^Time: (.*), from step 0$", text, re.MULTILINE)
    if not said or parts is None:
        raise ValueError(f"the dry run printed no memory or no time: {text[-300:]}")
    expected = sum(float(number) * UNITS[unit] for number, unit in re.findall(r"(\d+) (h|min|s)", parts[1]))
    began = time.perf_counter()
    called(asked, "train.py", *arguments)
    seconds = time.perf_counter() - began
    peaks = [line["peak_memory_gib"] for line in read_lines(folder / METRICS) if "peak_memory_gib" in line]
    memory = max(peaks)
    off = said["steps"] / memory - 1, expected / seconds - 1
    return {
        "said_gib": said["steps"], "gib": memory, "said_seconds": expected, "took_seconds": seconds,
        "holds": None if asked.device == "cpu" else abs(off[0]) <= MEMORY and abs(off[1]) <= TIME,
        "note": f"memory {off[0]:+.1%}, time {off[1]:+.1%}",
    }  # fmt: skip
