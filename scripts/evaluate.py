"""Measures drawn pictures against real ones: scripts/evaluate.py RUN, or scripts/evaluate.py FOLDER --real FOLDER

FID, KID, precision and recall with a feature network; class accuracy with a classifier, by default a support vector
machine trained on the real pictures; distances to the nearest training pictures, which show memorisation. For an
autoencoder: its validation metrics, and FID and KID of held-out pictures' reconstructions. For any task: what it
measures itself on the pictures that it drew, such as a PSNR. Prints JSON, and writes it to RUN/evaluation with a
picture of nearest neighbours (drawn above, training below).
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.utils import save_image
from tqdm.auto import tqdm

import datasets_lib
from datasets_lib.errors import InputError
from datasets_lib.images.decode import read_picture
from trainers.base import Trainer
from trainers.engine.config.base_options import BaseConfig
from trainers.engine.config.eval_networks import ALLOWED_FEATURES, classifier_problem, features_problem
from trainers.engine.config.trust import Trust
from trainers.engine.data.prefetch import to_device
from trainers.engine.data.workers import SlotExamples
from trainers.engine.encoders.stages import FrozenEncoders
from trainers.engine.run.files import make_folder, new_file, write_text
from trainers.engine.validation.feature_networks import load_classifier, load_features
from trainers.engine.validation.grids import grid_of
from trainers.engine.validation.means import mean_over
from trainers.engine.validation.metrics import (
    Batch,
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
from trainers.inference.arguments import OPTIONS, add_sampling_arguments, saved_run_of, trainer_of
from trainers.inference.command import command, path_argument, positive
from trainers.inference.picture_files import below
from trainers.inference.saved_run import find_device

NEIGHBOURS = 20  # pictures shown, those with the shortest distances
OfTask = list[tuple[int, dict[str, float]]]  # for each batch: the number of pictures, and the task's sample_metrics


def drawn_pictures(
    trainer: Trainer, requests: list[dict], held_out: Any, seed: int, size: int, of_task: OfTask | None = None
) -> Iterator[Batch]:
    """Yields batches of pictures and the classes asked for; appends the task's own metrics to `of_task`."""
    with evaluation_mode(trainer, lambda steps: tqdm(steps, desc="sampling", leave=False)):
        for start in tqdm(range(0, len(requests), size), desc="drawing"):
            chosen = requests[start : start + size]
            numbers = list(range(start, start + len(chosen)))
            drawn = {name: images for name, [images] in draw(trainer, requests, numbers, seed, size, held_out).items()}
            if of_task is not None:
                of_task.append((len(chosen), trainer.sample_metrics(with_examples(chosen, held_out), drawn)))
            yield drawn.get("samples", next(iter(drawn.values()))), as_labels(chosen)


def means_of(of_task: OfTask) -> dict[str, float]:
    """Averages the task's metrics over pictures, as batches may differ in size."""
    sums: dict[str, float] = defaultdict(float)
    pictures: dict[str, int] = defaultdict(int)
    for count, metrics in of_task:
        for name, mean in metrics.items():
            sums[name] += count * mean
            pictures[name] += count
    return {name: total / pictures[name] for name, total in sums.items()}


def data_folder(folder: Path, resolution: int) -> Any:
    """Reads a folder of pictures, with classes if it has sub-folders; FileNotFoundError if there are none."""
    return datasets_lib.build(BaseConfig(train_data_dir=str(folder), resolution=resolution, center_crop=True), "train")


def held_out_metrics(trainer: Trainer, held_out: Any, numbers: list[int], size: int) -> dict[str, float]:
    """Averages the validation metrics over held-out examples."""
    examples = SlotExamples(held_out, 0, augment=False)
    keys = [[(number, number) for number in numbers[n : n + size]] for n in range(0, len(numbers), size)]
    loaded = (examples.batch(each) for each in tqdm(keys, desc="held-out pictures"))
    batches = ((batch, 1.0) for batch in to_device(loaded, examples.finish, trainer.device))
    with evaluation_mode(trainer):
        means = mean_over(FrozenEncoders(trainer.encoders(), trainer.device), batches, 0, trainer.validation_metrics)
    means = trainer.validation_summary(means)
    return {name: value for name, value in means.items() if name != "loss"}  # its training-only terms are not loaded


class Task(NamedTuple):
    """The pictures to compare, and where the result goes."""

    drawn: Iterable[Batch]
    train_set: Any
    held_out: Any | None
    device: torch.device
    output_dir: Path
    of_task: OfTask  # complete once all pictures are drawn
    known: dict[str, float]  # metrics that need no drawn pictures
    originals: list[int] | None  # if the drawn pictures are reconstructions: the held-out examples


def of_run(arguments: argparse.Namespace) -> Task:
    """Compares pictures that a run draws with the data that it was trained on."""
    if arguments.held_out is not None:
        raise InputError("--held-out: has an effect with --real only; a run has its own validation set")
    saved = saved_run_of(arguments)
    trainer = trainer_of(arguments, saved)
    trainer.base.buckets = False  # pictures of one size are compared
    train_set, held_out = [saved.build_data(trainer.base, split) for split in ("train", "validation")]
    requests = evaluation_requests(trainer, arguments.number or 1000, held_out)
    if not requests:
        without = " without base.validation_split" if trainer.draws_held_out and held_out is None else ""
        raise InputError(f"task {saved.task} draws no pictures{without}")
    of_task: OfTask = []
    drawn = drawn_pictures(trainer, requests, held_out, arguments.seed, arguments.batch_size, of_task)
    originals = [request["example"] for request in requests] if "example" in requests[0] else None
    known = held_out_metrics(trainer, held_out, originals, arguments.batch_size) if originals else {}
    output_dir = below(saved.folder, "evaluation")
    return Task(drawn, train_set, held_out, trainer.device, output_dir, of_task, known, originals)


def of_folders(arguments: argparse.Namespace) -> Task:
    """Compares a folder of pictures with a folder of real ones, at the size of the first picture."""
    folder, real = arguments.path, arguments.real
    names = [name for name in (*OPTIONS, "weights", "number", "seed") if getattr(arguments, name)]
    without_effect = [*arguments.overrides, *(f"--{name.replace('_', '-')}" for name in names)]
    if without_effect:
        raise InputError(f"{' '.join(without_effect)}: has no effect with --real")
    first = data_folder(folder, 8)
    side = min(read_picture(first.source.images[first.rows[0]]).size)
    pictures, train_set = data_folder(folder, side), data_folder(real, side)
    held_out = data_folder(arguments.held_out, side) if arguments.held_out else None
    for other, place in ((pictures, folder), (held_out, arguments.held_out)):
        named = None if other is None else other.label_names
        if named and train_set.label_names and named != train_set.label_names:
            raise InputError(f"{place} and {real}: have other classes; name their sub-folders alike")
    drawn = pictures_of(pictures, list(range(len(pictures))), arguments.batch_size)
    output_dir = folder.absolute().parent / f"{folder.name}-evaluation"
    return Task(drawn, train_set, held_out, find_device(arguments.device), output_dir, [], {}, None)


def evaluate(task: Task, arguments: argparse.Namespace) -> tuple[dict[str, Any], Tensor]:
    """Computes all metrics, and a grid [C, H, W]: drawn pictures above the nearest training pictures.

    For reconstructions, the grid has originals above and reconstructions below.
    """
    features = load_features(arguments.features, task.device)
    classifier = load_classifier(arguments.judge, task.device) if arguments.judge else None

    def described(dataset: Any, chosen: list[int] | None = None) -> Described:
        chosen = chosen or spread(len(dataset), arguments.real_number or len(dataset))
        batches = pictures_of(dataset, chosen, arguments.batch_size)
        rounds = -(-len(chosen) // arguments.batch_size)
        return describe(tqdm(batches, desc="real pictures", total=rounds), task.device, features, classifier)

    if task.originals is not None:
        drawn = describe(task.drawn, task.device, features, classifier)
        originals = described(task.held_out, task.originals)
        metrics: dict[str, Any] = {"pictures": len(drawn.thumbnails)}
        shown = spread(len(task.originals), NEIGHBOURS)
        grid = grid_of([originals.thumbnails[shown], drawn.thumbnails[shown]], len(shown))
        metrics |= task.known | measure_reconstructions(drawn, originals) | means_of(task.of_task)
        return metrics, grid
    real = described(task.train_set)
    held_out = described(task.held_out) if task.held_out is not None else None
    drawn = describe(task.drawn, task.device, features, classifier)
    classes = drawn.labels is not None and real.labels is not None
    recognise = train_classifier(real) if classes and drawn.predicted is None else None
    metrics = {"pictures": len(drawn.thumbnails), "real_pictures": len(real.thumbnails)}
    own = nearest(held_out.vectors, real.vectors)[0] if held_out is not None and not arguments.real_number else None
    metrics |= measure(drawn, real, own, recognise) | means_of(task.of_task)
    seen = recognised(drawn, recognise) if classes else None
    if seen is not None and drawn.labels is not None:
        names, found = task.train_set.label_names, accuracy_by_class(seen, drawn.labels)
        metrics["accuracy_by_class"] = {names[k] if names else k: value for k, value in found.items()}
        if held_out is not None and held_out.labels is not None:  # what the classifier achieves on real pictures
            seen = recognised(held_out, recognise)
            assert seen is not None  # as for the drawn pictures
            metrics["class_accuracy_held_out"] = (seen == held_out.labels).double().mean().item()
    distances, indices = nearest(drawn.vectors, real.vectors)
    shown = distances.argsort()[:NEIGHBOURS].tolist()
    return metrics, grid_of([drawn.thumbnails[shown], real.thumbnails[indices[shown]]], len(shown))


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=path_argument, help="a run, one of its checkpoints, or a folder of pictures")
    add_sampling_arguments(parser)
    parser.add_argument("--number", type=positive, help="pictures that a run draws, evenly over classes; default: 1000")
    parser.add_argument(
        "--real", type=path_argument, help="folder of real pictures; PATH is then a folder of pictures, too"
    )
    parser.add_argument("--held-out", type=path_argument, help="with --real: folder of real pictures not trained on")
    parser.add_argument("--real-number", type=positive, help="at most this many of the real pictures; default: all")
    parser.add_argument("--features", default="inception", help=f"network for FID and the like: {ALLOWED_FEATURES}")
    parser.add_argument("--judge", help="classifier: a noisy_classifier run or a TorchScript file; default: an SVM")
    parser.add_argument("--output-dir", type=path_argument, help="default: RUN/evaluation, or FOLDER-evaluation")
    arguments = parser.parse_intermixed_args()
    trust = Trust(everything=arguments.trust_code)
    if problem := features_problem(arguments.features) or trust.program_problem(arguments.features):
        raise InputError(f"--features {arguments.features}: {problem}")
    if arguments.judge and (problem := classifier_problem(arguments.judge) or trust.program_problem(arguments.judge)):
        raise InputError(f"--judge {arguments.judge}: {problem}")
    task = of_run(arguments) if arguments.real is None else of_folders(arguments)
    metrics, picture = evaluate(task, arguments)
    folder = arguments.output_dir or task.output_dir
    make_folder(folder)
    infinite = [k for k, v in metrics.items() if isinstance(v, float) and not math.isfinite(v)]  # JSON has only null
    text = json.dumps(metrics | dict.fromkeys(infinite), indent=1)
    write_text(folder / "metrics.json", text)
    with new_file(folder / "nearest.png") as file:
        save_image(picture, file, "PNG")
    print(text)


if __name__ == "__main__":
    main()
