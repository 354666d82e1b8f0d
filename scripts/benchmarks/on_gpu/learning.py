"""The quickstart and zero_to_lora on the card, with their judges: as good as on CPUs, less what two seeds differ by."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from scripts.benchmarks.on_gpu.section import Asked, Case
from scripts.benchmarks.runs import ROOT

# on CPUs, with seeds 0 and 1
QUICKSTART = {"class_accuracy": (0.991, 0.992)}
ZERO_TO_LORA = {"styled": (1.0, 1.0), "styled_shape": (0.992, 0.996), "lora_accuracy": (0.994, 0.970)}
FEW = ["base.max_train_steps=4", "base.valid_steps=4", "base.checkpointing_steps=4"]


class Runs(NamedTuple):
    """Where they go, and whether they are only to see that everything works."""

    folder: Path
    tiny: bool

    def train(self, config: str, task: str, folder: Path, *overrides: str) -> None:
        few = [*FEW, f"{task}.lr_warmup_steps=1", f"{task}.valid_batch_size=2"] if self.tiny else []
        called("train.py", config, f"base.output_dir={folder}", "base.logger=none", *overrides, *few)

    def judged(self, printed: str, wanted: dict[str, tuple[float, float]]) -> dict[str, Any]:
        found = json.loads(printed[printed.index("{") :])
        holds = all(found[name] >= min(seeds) - abs(seeds[0] - seeds[1]) for name, seeds in wanted.items())
        notes = [f"{name} {found[name]:.3f} (CPUs {a:.3f}, {b:.3f})" for name, (a, b) in wanted.items()]
        return {"holds": None if self.tiny else holds, "note": ", ".join(notes)}


def cases(asked: Asked) -> dict[str, Case]:
    runs = Runs(asked.folder, asked.tiny)
    return {"quickstart": partial(quickstart, runs), "zero to LoRA": partial(zero_to_lora, runs)}


def quickstart(runs: Runs) -> dict[str, Any]:
    folder = runs.folder / "quickstart"
    runs.train("configs/digits.yaml", "conditional_ddpm", folder)
    number = 20 if runs.tiny else 1000
    return runs.judged(called("scripts/evaluate.py", folder, "--number", number, "--features", "none"), QUICKSTART)


def zero_to_lora(runs: Runs) -> dict[str, Any]:
    """The stages of scripts/zero_to_lora.sh, which needs the environment that it makes."""
    data, vae, blank, base, lora = (runs.folder / name for name in ("data", "vae", "blank", "base", "lora"))
    colors, plain, paper = (f"base.train_data_dir={data}/{kind}" for kind in ("colors", "plain", "paper"))
    configs = "configs/zero_to_lora"
    called("scripts/data/make_digits.py", data)
    runs.train(f"{configs}/vae.yaml", "vae", vae, colors)
    called("scripts/data/make_base.py", vae, f"{configs}/base.yaml", blank, "--max-length", 8, plain)
    start = "text_to_image.pretrained_model_name_or_path"
    runs.train(f"{configs}/base.yaml", "text_to_image", base, plain, f"{start}={blank}")
    runs.train(f"{configs}/lora.yaml", "lora", lora, paper, f"lora.pretrained_model_name_or_path={base}")
    number = 10 if runs.tiny else 500
    return runs.judged(called("scripts/benchmarks/measure_style.py", base, lora, "--number", number), ZERO_TO_LORA)


def called(*arguments: Any) -> str:
    """What a script printed; a failure is a RuntimeError with the end of it."""
    command = [sys.executable, *map(str, arguments)]
    ended = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(f"{arguments[0]} ended with {ended.returncode}: {(ended.stdout + ended.stderr)[-300:]}")
    return ended.stdout
