"""Metrics against one setting: scripts/sweep.py RUN --vary guidance=0,1,1.5,2,3 --output docs/digits-guidance

Varies guidance, classifier_scale, steps (of sampling), or checkpoint (all of the run's; takes no list), with averaged
and with raw weights. Writes OUTPUT.json, a table OUTPUT.md, a plot OUTPUT.png, and OUTPUT-pictures.png with the first
pictures of each row. Classes are recognised by the support vector machine of scripts/evaluate.py.

--base BASE_RUN also draws an adapter's base model, from the same noise, and measures how far each row's pictures are
from the base's at the last value. Overrides of a task's section apply to the run of that task. Needs matplotlib
(pip install diffloop[dev]).
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from torchvision.utils import save_image
from tqdm.auto import tqdm

from datasets_lib.errors import InputError
from scripts.evaluate import drawn_pictures
from trainers.engine.checkpoint.manifest import list_checkpoints
from trainers.engine.run.files import make_folder, new_file, write_text
from trainers.engine.validation.grids import labelled_grid
from trainers.engine.validation.metrics import Described, describe, measure, nearest, pictures_of, train_classifier
from trainers.engine.validation.sampling import evaluation_requests
from trainers.inference.arguments import add_sampling_arguments, overrides_of, saved_run_of, trainer_of
from trainers.inference.command import command, path_argument, positive
from trainers.inference.saved_run import AVERAGED, RAW

COLUMNS = {
    "class_accuracy": "recognised",
    "worst_class_accuracy": "worst class",
    "class_diversity": "diversity within a class, over real",
    "nearest_distance": "distance to the nearest training picture, median",
    "copies": "nearer than 95 % of held-out ones",
    "distance": "root mean square distance to the base at the last value",
}
SHOWN = 10  # pictures of a row


def points(arguments: argparse.Namespace) -> list[argparse.Namespace]:
    """Returns the arguments of each row, with its `value` and its `kind`: "ema", "raw" or "base"."""
    name, _, values = arguments.vary.partition("=")
    changes: list[tuple[str, dict[str, Any]]] = []
    if name == "checkpoint":
        changes = [(str(step), {"path": path}) for step, path in reversed(list_checkpoints(arguments.path))]
    elif name in ("guidance", "classifier_scale", "steps"):
        changes = [(value, {name: value}) for value in values.split(",") if value]
    if not changes:
        wanted = "guidance=, classifier_scale= or steps=A,B,..., or checkpoint for a run with checkpoints"
        raise InputError(f"--vary {arguments.vary}: must be {wanted}")
    found = []
    for (value, changed), (kind, side) in itertools.product(changes, sides(arguments)):
        point = argparse.Namespace(**vars(arguments) | changed | side, value=value, kind=kind)
        saved = saved_run_of(point)
        saved.config(overrides_of(point, saved))  # raises before the first picture is drawn
        found.append(point)
    return found


def sides(arguments: argparse.Namespace) -> list[tuple[str, dict[str, Any]]]:
    """Lists the kinds of weights, and the base model, each with the arguments that it changes."""
    saved = saved_run_of(arguments)
    kinds = [arguments.weights] if arguments.weights else [AVERAGED, RAW] if saved.config().config.use_ema else [RAW]
    if arguments.base is None:
        return [(kind, {"weights": kind}) for kind in kinds]
    tasks = saved.task, saved_run_of(arguments, arguments.base).task
    own, others = ([each for each in arguments.overrides if not each.startswith(f"{task}.")] for task in tasks[::-1])
    run = [(kind, {"weights": kind, "overrides": own}) for kind in kinds]
    return [("base", {"path": arguments.base, "weights": None, "overrides": others}), *run]


def sweep(arguments: argparse.Namespace) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """Yields a row of metrics, and its pictures, for each value and kind of weights."""
    chosen, saved, cpu = points(arguments), saved_run_of(arguments), torch.device("cpu")
    base = saved.config().base
    sets: Any = saved.build_data(base, "train"), saved.build_data(base, "validation")
    real, others = [s and describe(pictures_of(s, list(range(len(s))), 500), cpu) for s in sets]
    own, recognise = nearest(others.vectors, real.vectors)[0] if others else None, None

    @cache
    def drawn(number: int) -> Described:
        trainer = trainer_of(chosen[number], saved_run_of(chosen[number]))
        requests = evaluation_requests(trainer, arguments.number, sets[1])
        if not requests:
            raise InputError(f"{arguments.path}: its task draws no pictures")
        if real.labels is None or "label" not in requests[0]:
            raise InputError(f"{arguments.path}: has no classes; only pictures drawn by class can be recognised")
        return describe(drawn_pictures(trainer, requests, None, arguments.seed, arguments.batch_size), trainer.device)

    last = max((number for number, point in enumerate(chosen) if point.kind == "base"), default=None)
    for number, point in enumerate(tqdm(chosen, desc=arguments.vary.partition("=")[0])):
        pictures = drawn(number)
        recognise = recognise or train_classifier(real)
        found = measure(pictures, real, own, recognise)
        if last is not None:
            found["distance"] = (pictures.vectors - drawn(last).vectors).square().mean().sqrt().item()
        yield {"value": point.value, "weights": point.kind} | found, pictures.thumbnails


def as_table(name: str, rows: list[dict]) -> str:
    columns = {key: title for key, title in COLUMNS.items() if key in rows[0]}
    lines = [f"| {name} | weights | {' | '.join(columns.values())} |", "|---" * (len(columns) + 2) + "|"]
    for row in rows:
        lines.append(f"| {row['value']} | {row['weights']} | {' | '.join(f'{row[key]:.3f}' for key in columns)} |")
    return "\n".join(lines) + "\n"


def plot(name: str, rows: list[dict], path: Path) -> None:
    """Plots recognised pictures and diversity against the value, with a line for each kind of weights."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for axis, key in zip(axes, ("class_accuracy", "class_diversity"), strict=True):
        for kind in dict.fromkeys(row["weights"] for row in rows):
            own = [row for row in rows if row["weights"] == kind]
            axis.plot([float(row["value"]) for row in own], [row[key] for row in own], marker="o", label=kind)
        axis.set(xlabel=name, ylabel=COLUMNS[key])
        axis.grid(alpha=0.3)
    axes[0].legend()
    with new_file(path) as file:
        figure.savefig(file, format="png", dpi=110)
    plt.close(figure)


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=path_argument, help="folder of a run with classes")
    parser.add_argument("--base", type=path_argument, help="a finished run: the base model of the adapter in PATH")
    parser.add_argument("--vary", required=True, help="guidance=A,B,..., classifier_scale=, steps=, or checkpoint")
    parser.add_argument("--number", type=positive, default=1000, help="pictures per row")
    parser.add_argument("--output", type=path_argument, required=True, help="path of the files, without their suffixes")
    add_sampling_arguments(parser)
    arguments = parser.parse_intermixed_args()
    name, rows, pictures = arguments.vary.partition("=")[0], [], []
    make_folder(arguments.output.parent)
    for row, drawn in sweep(arguments):
        rows.append(row)
        pictures.append(drawn[:SHOWN].expand(-1, max(3, drawn.shape[1]), -1, -1))
        write_text(arguments.output.with_suffix(".json"), json.dumps(rows, indent=1))
    write_text(arguments.output.with_suffix(".md"), as_table(name, rows))
    plot(name, rows, arguments.output.with_suffix(".png"))
    columns = {str(number): torch.stack(column) for number, column in enumerate(zip(*pictures, strict=True))}
    picture = labelled_grid(columns, [f"{row['value']} {row['weights']}" for row in rows])
    with new_file(arguments.output.with_name(f"{arguments.output.name}-pictures.png")) as file:
        save_image(picture, file, "PNG")
    print(as_table(name, rows), end="")


if __name__ == "__main__":
    main()
