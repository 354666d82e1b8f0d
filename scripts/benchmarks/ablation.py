"""What each knob is worth: one change at a time from plain float32, then all of them; each run in its own process.

Task text_to_image with an eighth of the widths of Stable Diffusion 1.5's UNet, random weights, latents of 16 x 16. Peak
memory is that of the steps: of the process, or of the device where there is a GPU.
"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from scripts.benchmarks.bases import stable_diffusion
from scripts.benchmarks.runs import configured, examples_per_second, logged

CONFIG = "configs/tests/text_to_image.json"
CACHES = ["base.center_crop=true", "text_to_image.cache_latents=memory", "text_to_image.cache_text=memory"]
PLAIN = "eager float32, optimizer not fused"
KNOBS = {
    "bf16": ["base.mixed_precision=bf16"],
    "channels_last": ["base.channels_last=true"],
    "fused optimizer": [],
    "compile": ["base.compile=true"],
    "compile repeated blocks": ["base.compile=true", "base.compile_repeated_blocks=true"],
    "caches": CACHES,
    "batch 16": ["base.train_batch_size=16"],
}


def rows() -> dict[str, tuple[bool, list[str]]]:
    """Name -> whether the optimizer is fused, overrides."""
    fixed = [
        "base.resolution=64", "base.channels_last=false", "text_to_image.noise_offset=0",
        f"text_to_image.pretrained_model_name_or_path={stable_diffusion('eighth')}",
    ]  # fmt: skip
    found = {PLAIN: (False, fixed)}
    found |= {name: (name == "fused optimizer", [*fixed, *options]) for name, options in KNOBS.items()}
    kept = [option for name in ("bf16", "caches", "batch 16") for option in KNOBS[name]]
    return found | {
        "bf16, fused, caches, batch 16": (True, [*fixed, *kept]),
        "the same with channels_last": (True, [*fixed, *kept, *KNOBS["channels_last"]]),
        "the same with repeated blocks compiled": (True, [*fixed, *kept, *KNOBS["compile repeated blocks"]]),
    }


def table(repetitions: int, steps: int) -> list[dict[str, Any]]:
    """Medians of runs in turns: examples/s, their ratio to plain float32, peak memory in GiB."""
    measured: dict[str, list[tuple[float, float]]] = {}
    pool = multiprocessing.get_context("spawn")
    for _ in range(repetitions):
        for name, (fused, overrides) in rows().items():
            with pool.Pool(1) as process:
                found = process.apply(measure, (fused, overrides, steps, torch.get_num_threads()))
            measured.setdefault(name, []).append(found)
    rates = {name: statistics.median(rate for rate, _ in found) for name, found in measured.items()}
    return [
        {
            "change": name,
            "examples_per_second": rates[name],
            "ratio": rates[name] / rates[PLAIN],
            "peak_memory_gib": statistics.median(memory for _, memory in found),
            "runs": [rate for rate, _ in found],
        }
        for name, found in measured.items()
    ]


def measure(fused: bool, overrides: list[str], steps: int, threads: int) -> tuple[float, float]:
    torch.set_num_threads(threads)
    plain = torch.optim.AdamW
    with tempfile.TemporaryDirectory() as folder:
        run = configured(CONFIG, folder, steps, overrides)
        with patch.object(torch.optim, "AdamW", lambda groups, **options: plain(groups, **options | {"fused": fused})):
            [rate] = examples_per_second(run)
        return rate, max(logged(Path(run.base.output_dir), "peak_memory_gib"))
