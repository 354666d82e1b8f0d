"""The quickstart and zero_to_lora on the card, with their judges: as good as on CPUs, less what two seeds differ by."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from scripts.benchmarks.on_gpu.section import Asked, Case, called

# on CPUs, with seeds 0 and 1
QUICKSTART = {"class_accuracy": (0.991, 0.992)}
ZERO_TO_LORA = {"styled": (1.0, 1.0), "styled_shape": (0.992, 0.996), "lora_accuracy": (0.994, 0.970)}
FEW = ["base.max_train_steps=4", "base.valid_steps=4", "base.checkpointing_steps=4"]


def cases(asked: Asked) -> dict[str, Case]:
    return {"quickstart": partial(quickstart, asked), "zero to LoRA": partial(zero_to_lora, asked)}


def train(asked: Asked, config: str, task: str, folder: Path, *overrides: str) -> None:
    few = [*FEW, f"{task}.lr_warmup_steps=1", f"{task}.valid_batch_size=2"] if asked.tiny else []
    called(asked, "train.py", config, f"base.output_dir={folder}", "base.logger=none", *overrides, *few)


def judged(asked: Asked, printed: str, wanted: dict[str, tuple[float, float]]) -> dict[str, Any]:
    found = json.loads(printed[printed.index("{") :])
    holds = all(found[name] >= min(seeds) - abs(seeds[0] - seeds[1]) for name, seeds in wanted.items())
    notes = [f"{name} {found[name]:.3f} (CPUs {a:.3f}, {b:.3f})" for name, (a, b) in wanted.items()]
    return {"holds": None if asked.tiny else holds, "note": ", ".join(notes)}


def quickstart(asked: Asked) -> dict[str, Any]:
    folder = asked.folder / "quickstart"
    train(asked, "configs/digits.yaml", "conditional_ddpm", folder)
    number = 20 if asked.tiny else 1000
    return judged(
        asked, called(asked, "scripts/evaluate.py", folder, "--number", number, "--features", "none"), QUICKSTART
    )


def zero_to_lora(asked: Asked) -> dict[str, Any]:
    """The stages of scripts/zero_to_lora.sh, which needs the environment that it makes."""
    data, vae, blank, base, lora = (asked.folder / name for name in ("data", "vae", "blank", "base", "lora"))
    colors, plain, paper = (f"base.train_data_dir={data}/{kind}" for kind in ("colors", "plain", "paper"))
    configs = "configs/zero_to_lora"
    called(asked, "scripts/data/make_digits.py", data)
    train(asked, f"{configs}/vae.yaml", "vae", vae, colors)
    called(asked, "scripts/data/make_base.py", vae, f"{configs}/base.yaml", blank, "--max-length", 8, plain)
    start = "text_to_image.pretrained_model_name_or_path"
    train(asked, f"{configs}/base.yaml", "text_to_image", base, plain, f"{start}={blank}")
    train(asked, f"{configs}/lora.yaml", "lora", lora, paper, f"lora.pretrained_model_name_or_path={base}")
    number = 10 if asked.tiny else 500
    return judged(
        asked, called(asked, "scripts/benchmarks/measure_style.py", base, lora, "--number", number), ZERO_TO_LORA
    )
