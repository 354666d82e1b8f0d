"""The card and the software on which a section runs, and what a row leaves behind in the process."""

from __future__ import annotations

import datetime
import gc
import importlib.metadata
import os
import platform
import shutil
import subprocess
from functools import cache
from typing import Any

import torch

from scripts.benchmarks.runs import reset_accelerate

PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate")
PEAKS = {"H200": 989.5e12, "H100": 989.5e12, "A100": 312e12}  # dense bf16 FLOP/s of the data sheets


@cache
def about(section: str, tiny: bool) -> dict[str, Any]:
    """Describes a measurement: command, date, card, driver, versions."""
    versions = {"Python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "command": f"scripts/benchmarks/gpu.py OUT --sections {section}{' --device cpu --tiny' * tiny}",
        "date": datetime.date.today().isoformat(),
        "card": torch.cuda.get_device_name() if torch.cuda.is_available() else "no card",
        "driver": driver(),
        "cuda": torch.version.cuda,
        "cores": os.cpu_count(),
        "versions": versions,
    }


def driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "none"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def clean_up() -> None:
    """Gives back what the last row left on the card, and accelerate's state, which is global."""
    reset_accelerate()
    free_memory()


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_flops() -> float | None:
    """The card's dense bf16 FLOP/s by its data sheet, if it is a known one."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((peak for part, peak in PEAKS.items() if part in name), None)
