"""Compares pictures drawn from a finished run on `digits` with real held-out digits: scripts/judge_digits.py RUN.

Prints JSON: confidence and class histogram by a support vector machine that was trained on the real training digits,
diversity, and the distance to the nearest training digit (memorisation), each beside that of held-out digits.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.calibration import CalibratedClassifierCV
from sklearn.svm import SVC
from torch.nn.functional import avg_pool2d

sys.path.insert(0, str(Path(__file__).parents[1]))

import datasets_lib
from trainers.engine.config import RunConfig, load_config


def draw(run: RunConfig, count: int, steps: int, seed: int) -> torch.Tensor:
    """Pictures [count, C, H, W] in [0, 1] from the run's finished pipeline with DDIM, one seed per picture."""
    from diffusers import DDIMScheduler

    pipeline = run.trainer_class.load_pipeline(run.base.output_dir)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    pictures = []
    for start in range(0, count, 100):
        size = min(100, count - start)
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(size)]
        drawn = pipeline(batch_size=size, generator=generators, num_inference_steps=steps, output_type="np").images
        pictures.append(torch.from_numpy(drawn).permute(0, 3, 1, 2))
    return torch.cat(pictures)


def real(run: RunConfig, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Real digits as vectors [N, 64] in [0, 1], and their labels."""
    examples = datasets_lib.build(run.base, split)
    found = [examples.get(i, None) for i in range(len(examples))]
    return as_vectors(torch.stack([e["image"] for e in found]) / 2 + 0.5), np.array([e["label"] for e in found])


def as_vectors(images: torch.Tensor) -> np.ndarray:
    """The 8 x 8 grey values in which the digits were recorded, [N, 64]."""
    factor = images.shape[-1] // 8
    return avg_pool2d(images.mean(1, keepdim=True), factor).flatten(1).numpy()


def nearest(vectors: np.ndarray, others: np.ndarray) -> np.ndarray:
    return torch.cdist(torch.from_numpy(vectors), torch.from_numpy(others)).min(1).values.numpy()


def mean_pairwise(vectors: np.ndarray) -> float:
    return float(torch.pdist(torch.from_numpy(vectors)).mean())


def judge(drawn: np.ndarray, train: tuple, held_out: tuple) -> dict[str, object]:
    """The numbers of one comparison; drawn, train and held-out digits are vectors [N, 64]."""
    machine = CalibratedClassifierCV(SVC(gamma="scale", C=10), ensemble=False).fit(*train)
    histogram = np.bincount(machine.predict(drawn), minlength=10) / len(drawn)
    real_fifth = float(np.percentile(nearest(held_out[0], train[0]), 5))
    drawn_nearest = nearest(drawn, train[0])
    return {
        "samples": len(drawn),
        "machine accuracy on held-out digits": float(machine.score(*held_out)),
        "mean confidence, drawn": float(machine.predict_proba(drawn).max(1).mean()),
        "mean confidence, held out": float(machine.predict_proba(held_out[0]).max(1).mean()),
        "class histogram, drawn": [round(float(part), 3) for part in histogram],
        "histogram over uniform, smallest and largest": [float(histogram.min() * 10), float(histogram.max() * 10)],
        "mean pairwise distance, drawn over held out": mean_pairwise(drawn) / mean_pairwise(held_out[0]),
        "nearest training digit, median drawn": float(np.median(drawn_nearest)),
        "nearest training digit, 5th percentile drawn": float(np.percentile(drawn_nearest, 5)),
        "nearest training digit, 5th percentile held out": real_fifth,
        "part of drawn under that": float((drawn_nearest < real_fifth).mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a finished ddpm run on digits")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=50, help="DDIM steps")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    run = load_config(options.run / "config.yaml", [f"base.output_dir={options.run}"])
    drawn = as_vectors(draw(run, options.samples, options.steps, options.seed))
    print(json.dumps(judge(drawn, real(run, "train"), real(run, "validation")), indent=1))


if __name__ == "__main__":
    main()
