"""The digits of diffloop and of the pip package denoising-diffusion-pytorch, by guidance scale.

Both train the package's own network from the same initial weights on the same digits for the same number of steps, with
the same batch size, learning rates, clipping and label dropout; each with its own loss code, averaging and sampler. A
support vector machine recognises the digits. Needs the package.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scripts.benchmarks.peer import CONFIG, Package, digits_of
from scripts.benchmarks.runs import examples_per_second, seconds_of
from scripts.evaluate import drawn_pictures
from trainers.engine.config.config import RunConfig, load_config
from trainers.engine.validation.metrics import Batch, describe, measure, train_classifier
from trainers.engine.validation.sampling import evaluation_requests
from trainers.inference.saved_run import load_trainer, open_run

SCALES = [1.0, 1.5, 3.0, 6.0]  # 6 is the package's default
METRICS = ("class_accuracy", "worst_class_accuracy", "class_diversity")
SAMPLES, TOGETHER = 500, 100  # pictures of each side, and at once
CPU = torch.device("cpu")


def rows(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each scale; pairs are (package, diffloop)."""
    with tempfile.TemporaryDirectory() as folder:
        options = [f"base.output_dir={folder}/run", f"base.max_train_steps={asked.steps}"]
        run = load_config(CONFIG, [*options, f"base.checkpointing_steps={asked.steps}"])
        images, labels = digits_of(run)
        real = describe([(images, labels)], CPU)
        recognise = train_classifier(real)
        package = Package(run, update_every=10)
        trainings = (lambda: train_package(package, run, images, labels), lambda: examples_per_second(run))
        seconds = tuple(seconds_of(training, 1) for training in trainings)
        found = []
        for scale in SCALES:
            drawn = draw_package(package, scale), draw_diffloop(run, scale)
            measured = [measure(describe(pictures, CPU), real, recognise=recognise) for pictures in drawn]
            pairs = {name: tuple(side[name] for side in measured) for name in METRICS}
            found.append({"guidance_scale": scale} | pairs | {"training_seconds": seconds})
    return found


def train_package(package: Package, run: RunConfig, images: Tensor, labels: Tensor) -> None:
    size, steps = run.base.train_batch_size, run.base.max_train_steps or 0
    order = torch.cat([torch.randperm(len(images)) for _ in range(-(-steps * size // len(images)))])
    for chosen in order[: steps * size].split(size):
        package.step(images[chosen], labels[chosen])


def draw_package(package: Package, scale: float) -> list[Batch]:
    torch.manual_seed(0)
    return [(package.draw(scale, part), part) for part in (torch.arange(SAMPLES) % 10).split(TOGETHER)]


def draw_diffloop(run: RunConfig, scale: float) -> Iterator[Batch]:
    trainer = load_trainer(open_run(Path(run.base.output_dir), trust_code=True), [f"peer.guidance_scale={scale}"])
    return drawn_pictures(trainer, evaluation_requests(trainer, SAMPLES, None), None, 0, TOGETHER)
