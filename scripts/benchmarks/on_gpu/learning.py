"""The quickstart and zero_to_lora on the card, with their judges: as good as on CPUs, less what two seeds differ by."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from scripts.benchmarks.on_gpu.section import Asked, Case
from scripts.benchmarks.runs import ROOT

# of the CPU's seeds 0 and 1: the lower figure less the difference of the two
QUICKSTART = {"class_accuracy": (0.991, 0.992)}
ZERO_TO_LORA = {"styled": (1.0, 1.0), "styled_shape": (0.992, 0.996), "lora_accuracy": (0.994, 0.970)}


def cases(asked: Asked) -> dict[str, Case]:
    if asked.tiny:
        return {}
    return {"quickstart": partial(quickstart, asked.folder), "zero to LoRA": partial(zero_to_lora, asked.folder)}


def quickstart(folder: Path) -> dict[str, Any]:
    run = folder / "quickstart"
    train("configs/digits.yaml", run)
    return judged(called("scripts/evaluate.py", run, "--number", 1000, "--features", "none"), QUICKSTART)


def zero_to_lora(folder: Path) -> dict[str, Any]:
    """The stages of scripts/zero_to_lora.sh, which needs the environment that it makes."""
    data, vae, blank, base, lora = (folder / name for name in ("data", "vae", "blank", "base", "lora"))
    called("scripts/data/make_digits.py", data)
    train("configs/zero_to_lora/vae.yaml", vae, f"base.train_data_dir={data}/colors")
    plain = f"base.train_data_dir={data}/plain"
    called("scripts/data/make_base.py", vae, "configs/zero_to_lora/base.yaml", blank, "--max-length", 8, plain)
    train("configs/zero_to_lora/base.yaml", base, plain, f"text_to_image.pretrained_model_name_or_path={blank}")
    paper = f"base.train_data_dir={data}/paper"
    train("configs/zero_to_lora/lora.yaml", lora, paper, f"lora.pretrained_model_name_or_path={base}")
    return judged(called("scripts/benchmarks/measure_style.py", base, lora), ZERO_TO_LORA)


def train(config: str, folder: Path, *overrides: str) -> None:
    called("train.py", config, f"base.output_dir={folder}", "base.logger=none", *overrides)


def called(*arguments: Any) -> str:
    """What a script printed; a failure is a RuntimeError with the end of it."""
    command = [sys.executable, *map(str, arguments)]
    ended = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(f"{arguments[0]} ended with {ended.returncode}: {(ended.stdout + ended.stderr)[-300:]}")
    return ended.stdout


def judged(printed: str, wanted: dict[str, tuple[float, float]]) -> dict[str, Any]:
    found = json.loads(printed[printed.index("{") :])
    bounds = {name: min(seeds) - abs(seeds[0] - seeds[1]) for name, seeds in wanted.items()}
    note = ", ".join(f"{name} {found[name]:.3f} (CPU {seeds[0]:.3f}, {seeds[1]:.3f})" for name, seeds in wanted.items())
    return {"holds": all(found[name] >= bound for name, bound in bounds.items()), "note": note}
