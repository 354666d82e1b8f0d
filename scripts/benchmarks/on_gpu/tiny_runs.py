"""The tests' tiny runs of every task, on the card or on the CPU, and the numbers that they leave behind."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from scripts.benchmarks.runs import ROOT, from_tests, quiet, reset_accelerate
from train import train
from trainers import TRAINERS
from trainers.engine.config.config import load_config
from trainers.engine.run.run_folder import METRICS, read_lines

TASKS = tuple(TRAINERS)
STEPS = 8
OTHER_KERNELS = 1e-4  # of losses: the same numbers in float32 by other kernels, or in another order
# networks without dropout, which draws other numbers on another device
PLAIN: dict[str, dict[str, Any]] = {"lora": {"lora_dropout": 0.0}, "lcm_lora": {"lora_dropout": 0.0}}


class TinyRuns:
    """Runs below a folder, each under a name of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        from_tests("tiny_models").model("sd1")

    def config(self, task: str = "ddpm", name: str = "run", **values: Any) -> Path:
        """Writes configs/tests/TASK.json with other values, {"base.seed": 1, ...}, and returns its path."""
        document = json.loads((ROOT / "configs" / "tests" / f"{task}.json").read_text(encoding="utf-8"))
        document["base"] |= {"output_dir": str(self.folder / name), "max_train_steps": STEPS}
        for key, value in values.items():
            section, _, option = key.partition(".")
            document[section][option] = value
        path = self.folder / f"{name}.json"
        path.write_text(json.dumps(document), encoding="utf-8")
        return path

    def without_dropout(self, task: str) -> dict[str, Any]:
        """Options for a network without dropout."""
        options = {f"{task}.{name}": value for name, value in PLAIN.get(task, {}).items()}
        settings = json.loads((ROOT / "configs" / "tests" / f"{task}.json").read_text(encoding="utf-8"))[task]
        if "model_config" in settings:
            network = json.loads((ROOT / settings["model_config"]).read_text(encoding="utf-8"))
            if "dropout" in network:
                path = self.folder / f"{task}-network.json"
                path.write_text(json.dumps(network | {"dropout": 0.0}), encoding="utf-8")
                options[f"{task}.model_config"] = str(path)
        return options

    def train(self, task: str = "ddpm", name: str = "run", **values: Any) -> Path:
        """Trains, and returns the run's folder; nothing is printed."""
        try:
            with quiet():
                return train(load_config(self.config(task, name, **values)))
        finally:
            reset_accelerate()

    def losses(self, task: str, name: str, **values: Any) -> list[float]:
        return losses(self.train(task, name, **values))


def losses(folder: Path) -> list[float]:
    """The loss of each step; a step's last line counts, as a resumed run has others before."""
    found = {line["step"]: line["loss"] for line in read_lines(folder / METRICS) if "loss" in line}
    return [found[step] for step in sorted(found)]


def sums(folder: Path, metric: str) -> int:
    return round(sum(line.get(metric, 0.0) for line in read_lines(folder / METRICS)))


def difference(found: list[float], wanted: list[float]) -> float:
    """The largest difference of two runs' losses by step, relative to the mean of one run's."""
    if len(found) != len(wanted):
        raise ValueError(f"one run has {len(found)} steps and the other {len(wanted)}")
    scale = sum(map(abs, wanted)) / len(wanted)
    return max(abs(a - b) for a, b in zip(found, wanted, strict=True)) / scale


def bounded(found: float, bound: float) -> dict[str, Any]:
    return {"difference": found, "bound": bound, "holds": found <= bound}


@contextmanager
def on_cpu() -> Iterator[None]:
    with patch.dict(os.environ, {"ACCELERATE_USE_CPU": "true"}):
        yield
