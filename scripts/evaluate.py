"""Measures drawn pictures against real ones: scripts/evaluate.py RUN, or scripts/evaluate.py FOLDER --real FOLDER

FID, KID, precision and recall with a feature network; class accuracy with a classifier, by default a support vector
machine that is trained on the real pictures; distances to the nearest training pictures, which show memorisation.
Of an autoencoder: its validation's metrics, and FID and KID of held-out pictures' reconstructions.
Of any task what it says itself of the pictures that it drew, such as a PSNR.
Prints JSON and writes it with a picture of nearest neighbours (drawn above, training below) to RUN/evaluation.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate
from torchvision.utils import save_image
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

import datasets_lib
from trainers.base import Trainer
from trainers.engine.config.base_options import BaseConfig
from trainers.engine.config.eval_networks import ALLOWED_FEATURES, classifier_problem, features_problem
from trainers.engine.encoders.stages import FrozenEncoders
from trainers.engine.validation.feature_networks import load_classifier, load_features
from trainers.engine.validation.grids import grid_of
from trainers.engine.validation.means import mean_over
from trainers.engine.validation.metrics import (
    Described,
    accuracy_by_class,
    as_labels,
    describe,
    measure,
    measure_reconstructions,
    nearest,
    pictures_of,
    recognised,
    spread,
    train_classifier,
)
from trainers.engine.validation.sampling import draw, evaluation_mode, evaluation_requests, with_examples
from trainers.inference.arguments import OPTIONS, add_sampling_arguments, trainer_of
from trainers.inference.command import command, positive
from trainers.inference.saved_run import find_device

NEIGHBOURS = 20  # pictures with the shortest distances are shown


class SampleMetrics:
    """Means of the task's own sample_metrics over batches of different sizes."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.pictures: dict[str, int] = {}  # that the sum of each name is of

    def add(self, metrics: dict[str, float], pictures: int) -> None:
        for name, mean in metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + pictures * mean
            self.pictures[name] = self.pictures.get(name, 0) + pictures

    def means(self) -> dict[str, float]:
        return {name: total / self.pictures[name] for name, total in self.sums.items()}


def drawn_pictures(
    trainer: Trainer,
    requests: list[dict],
    held_out: Any | None,
    seed: int,
    size: int,
    of_task: SampleMetrics | None = None,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Batches of pictures and of the classes that were asked for; what the task says of them goes into `of_task`."""
    with evaluation_mode(trainer, lambda steps: tqdm(steps, desc="sampling", leave=False)):
        for start in tqdm(range(0, len(requests), size), desc="drawing"):
            numbers = list(range(start, min(start + size, len(requests))))
            drawn = {name: images for name, [images] in draw(trainer, requests, numbers, seed, size, held_out).items()}
            chosen = [requests[number] for number in numbers]
            if of_task is not None:
                of_task.add(trainer.sample_metrics(with_examples(chosen, held_out), drawn), len(chosen))
            yield drawn.get("samples", next(iter(drawn.values()))), as_labels(chosen)


def data_folder(folder: Path, resolution: int) -> Any:
    """The pictures of a folder, with classes where it has sub-folders; FileNotFoundError where it has none."""
    return datasets_lib.build(
        BaseConfig(train_data_dir=str(folder), resolution=resolution, center_crop=True, num_epochs=1), "train"
    )


def held_out_metrics(trainer: Trainer, held_out: Any, numbers: list[int], size: int) -> dict[str, float]:
    """Means of the validation's metrics over held-out examples."""

    def batches() -> Iterator[tuple[dict[str, Any], float]]:
        for start in tqdm(range(0, len(numbers), size), desc="held-out pictures"):
            chosen = numbers[start : start + size]
            batch = default_collate([{**held_out.get(number, None), "slot": number} for number in chosen])
            yield {k: v.to(trainer.device) if isinstance(v, Tensor) else v for k, v in batch.items()}, 1.0

    stages = FrozenEncoders(trainer.encoders(), trainer.device)
    with evaluation_mode(trainer):
        means = mean_over(stages, batches(), 0, trainer.validation_metrics)
    means = trainer.validation_summary(means)
    return {name: value for name, value in means.items() if name != "loss"}  # its training-only terms are not loaded


class Task(NamedTuple):
    """The pictures to compare, and where the result goes."""

    drawn: Iterable[tuple[Tensor, Tensor | None]]  # batches of pictures and classes
    train_set: Any
    held_out: Any | None
    originals: list[int] | None  # where the drawn pictures are reconstructions: the held-out ones' numbers
    known: dict[str, float]  # metrics that need no drawn pictures
    of_task: SampleMetrics  # what the task says of the pictures, once all are drawn
    device: torch.device
    output_dir: Path


def of_run(arguments: argparse.Namespace) -> Task:
    """Pictures that a run draws, against the data that it was trained on."""
    if arguments.held_out is not None:
        raise ValueError("--held-out: has an effect with --real only; a run has its own validation set")
    saved, trainer = trainer_of(arguments)
    trainer.base.buckets = False  # pictures of one size are compared
    train_set, held_out = [datasets_lib.build(trainer.base, split) for split in ("train", "validation")]
    requests = evaluation_requests(trainer, arguments.number or 1000, held_out)
    if not requests:
        without = " without base.validation_split" if trainer.draws_held_out and held_out is None else ""
        raise ValueError(f"task {saved.task} draws no pictures{without}")
    of_task = SampleMetrics()
    drawn = drawn_pictures(trainer, requests, held_out, arguments.seed, arguments.batch_size, of_task)
    originals = [request["example"] for request in requests] if "example" in requests[0] else None
    known = held_out_metrics(trainer, held_out, originals, arguments.batch_size) if originals else {}
    return Task(drawn, train_set, held_out, originals, known, of_task, trainer.device, saved.folder / "evaluation")


def of_folders(arguments: argparse.Namespace) -> Task:
    """A folder of pictures against a folder of real ones, at the size of the first picture."""
    folder, real = arguments.path, arguments.real
    without_effect = [
        f"--{name.replace('_', '-')}"
        for name in (*OPTIONS, "weights", "number", "seed")
        if getattr(arguments, name, None)
    ]
    if arguments.overrides or without_effect:
        raise ValueError(f"{' '.join([*arguments.overrides, *without_effect])}: has no effect with --real")
    side = min(Image.open(data_folder(folder, 8).name(0)).size)
    pictures, train_set = data_folder(folder, side), data_folder(real, side)
    held_out = data_folder(arguments.held_out, side) if arguments.held_out else None
    for other, place in ((pictures, folder), (held_out, arguments.held_out)):
        named = None if other is None else other.label_names
        if named and train_set.label_names and named != train_set.label_names:
            raise ValueError(f"{place} and {real}: have other classes; name their sub-folders alike")
    drawn = pictures_of(pictures, list(range(len(pictures))), arguments.batch_size)
    return Task(
        drawn,
        train_set,
        held_out,
        None,
        {},
        SampleMetrics(),
        find_device(arguments.device),
        folder.absolute().parent / f"{folder.name}-evaluation",
    )


def evaluate(task: Task, arguments: argparse.Namespace) -> tuple[dict[str, Any], Tensor]:
    """All metrics, and a grid [C, H, W] of the drawn pictures that are nearest to training pictures.

    Of reconstructions, the grid has originals above and reconstructions below.
    """
    judges = (
        load_features(arguments.features, task.device),
        load_classifier(arguments.judge, task.device) if arguments.judge else None,
    )

    def described(dataset: Any, chosen: list[int] | None = None) -> Described:
        chosen = chosen or spread(len(dataset), arguments.real_number or len(dataset))
        batches = pictures_of(dataset, chosen, arguments.batch_size)
        rounds = -(-len(chosen) // arguments.batch_size)
        return describe(tqdm(batches, desc="real pictures", total=rounds), task.device, *judges)

    if task.originals is not None:
        drawn, originals = describe(task.drawn, task.device, *judges), described(task.held_out, task.originals)
        shown = spread(len(task.originals), NEIGHBOURS)
        picture = grid_of([originals.thumbnails[shown], drawn.thumbnails[shown]], len(shown))
        known: dict[str, Any] = {"pictures": len(task.originals)} | task.known
        known |= measure_reconstructions(drawn, originals)
        return finite(known | task.of_task.means()), picture
    real = described(task.train_set)
    held_out = described(task.held_out) if task.held_out is not None else None
    drawn = describe(task.drawn, task.device, *judges)
    classes = drawn.labels is not None and real.labels is not None
    recognise = train_classifier(real) if classes and drawn.predicted is None else None
    metrics: dict[str, Any] = {"pictures": len(drawn.thumbnails), "real_pictures": len(real.thumbnails)}
    own = nearest(held_out.vectors, real.vectors)[0] if held_out is not None and not arguments.real_number else None
    metrics |= measure(drawn, real, own, recognise) | task.of_task.means()
    seen = recognised(drawn, recognise) if classes else None
    if seen is not None and drawn.labels is not None:
        names = getattr(task.train_set, "label_names", None)
        found = accuracy_by_class(seen, drawn.labels)
        metrics["accuracy_by_class"] = {names[k] if names else k: value for k, value in found.items()}
        if held_out is not None and held_out.labels is not None:  # what the classifier gets on real pictures
            seen = recognised(held_out, recognise)
            assert seen is not None  # as of the drawn pictures
            metrics["class_accuracy_held_out"] = (seen == held_out.labels).double().mean().item()
    return finite(metrics), neighbours(drawn, real)


def finite(metrics: dict[str, Any]) -> dict[str, Any]:
    """The metrics with None, which JSON has, for what is not finite."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}


def neighbours(drawn: Described, real: Described) -> Tensor:
    """The drawn pictures with the shortest distances to training pictures above these."""
    distances, indices = nearest(drawn.vectors, real.vectors)
    shown = distances.argsort()[:NEIGHBOURS]
    return grid_of([drawn.thumbnails[shown], real.thumbnails[indices[shown]]], len(shown))


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="a run, one of its checkpoints, or a folder of pictures")
    add_sampling_arguments(parser)
    parser.add_argument("--number", type=positive, help="a run draws so many, classes equally often; default: 1000")
    parser.add_argument("--real", type=Path, help="folder of real pictures; then PATH is a folder of pictures, too")
    parser.add_argument("--held-out", type=Path, help="with --real: folder of real pictures not trained on")
    parser.add_argument("--real-number", type=positive, help="use so many of the real pictures; default: all")
    parser.add_argument("--features", default="inception", help=f"network for FID and the like: {ALLOWED_FEATURES}")
    parser.add_argument("--judge", help="classifier: a noisy_classifier run or a TorchScript file; default: an SVM")
    parser.add_argument("--output-dir", type=Path, help="default: RUN/evaluation, or FOLDER-evaluation")
    arguments = parser.parse_intermixed_args()
    for option, problem in (
        ("--features", features_problem(arguments.features)),
        ("--judge", arguments.judge and classifier_problem(arguments.judge)),
    ):
        if problem:
            raise ValueError(f"{option} {getattr(arguments, option[2:])}: {problem}")
    task = of_run(arguments) if arguments.real is None else of_folders(arguments)
    metrics, picture = evaluate(task, arguments)
    folder = arguments.output_dir or task.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(metrics, indent=1)
    (folder / "metrics.json").write_text(text, encoding="utf-8")
    save_image(picture, folder / "nearest.png")
    print(text)


if __name__ == "__main__":
    main()
