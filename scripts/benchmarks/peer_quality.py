"""The digits of diffloop and of the pip package denoising-diffusion-pytorch, by guidance scale.

Both train the package's own network from the same initial weights on the same digits for the same number of steps, with
the same batch size, learning rates, clipping and label dropout; each with its own loss code, averaging and sampler. A
support vector machine says what it recognises. Needs the package.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scripts.benchmarks.peer import CONFIG, Package, digits_of
from scripts.benchmarks.runs import quiet, seconds_of
from train import train
from trainers.engine.config.config import RunConfig, load_config
from trainers.engine.validation.metrics import describe, measure, nearest, train_classifier
from trainers.engine.validation.sampling import draw, evaluation_mode
from trainers.inference.saved_run import load_trainer, open_run

SCALES = [1.0, 1.5, 3.0, 6.0]  # 6 is the package's default
METRICS = ("class_accuracy", "worst_class_accuracy", "class_diversity")
SAMPLES, TOGETHER = 500, 100  # pictures of each side, and at once
CPU = torch.device("cpu")


def tables(asked: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """A row for each scale; pairs are (package, diffloop)."""
    with tempfile.TemporaryDirectory() as folder:
        options = [f"base.output_dir={folder}/run", f"base.max_train_steps={asked.steps}"]
        run = load_config(CONFIG, [*options, f"base.checkpointing_steps={asked.steps}"])
        images, labels = digits_of(run)
        real, held_out = describe([(images, labels)], CPU), describe([digits_of(run, "validation")], CPU)
        judges = real, nearest(held_out.vectors, real.vectors)[0], train_classifier(real)
        package = Package(run, update_every=10)
        seconds = seconds_of(lambda: train_package(package, run, images, labels), 1), seconds_of(lambda: ours(run), 1)
        rows = []
        for scale in SCALES:
            drawn = draw_package(package, scale), draw_diffloop(run, scale)
            found = [measure(describe(pictures, CPU), *judges) for pictures in drawn]
            rows.append({"guidance_scale": scale} | {name: tuple(side[name] for side in found) for name in METRICS})
    return {"peer_quality": [row | {"training_seconds": seconds} for row in rows]}


def ours(run: RunConfig) -> None:
    with quiet():
        train(run)


def train_package(package: Package, run: RunConfig, images: Tensor, labels: Tensor) -> None:
    size, steps = run.base.train_batch_size, run.base.max_train_steps or 0
    order = torch.cat([torch.randperm(len(images)) for _ in range(-(-steps * size // len(images)))])
    for chosen in order[: steps * size].split(size):
        package.step(images[chosen], labels[chosen])


def draw_package(package: Package, scale: float) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    return [(package.draw(scale, part), part) for part in (torch.arange(SAMPLES) % 10).split(TOGETHER)]


def draw_diffloop(run: RunConfig, scale: float) -> list[tuple[Tensor, Tensor]]:
    trainer = load_trainer(open_run(Path(run.base.output_dir)), [f"peer.guidance_scale={scale}"])
    requests = trainer.evaluation_requests(SAMPLES)
    with evaluation_mode(trainer):
        batches = draw(trainer, requests, list(range(SAMPLES)), 0, TOGETHER)["samples"]
    return list(zip(batches, (torch.arange(SAMPLES) % 10).split(TOGETHER), strict=True))
