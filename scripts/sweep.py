"""Metrics against one setting: scripts/sweep.py RUN --vary guidance=0,1,1.5,2,3 --output docs/digits-guidance

Varies guidance, classifier_scale or steps (of the sampler), or checkpoint (those of the run, without a list), with
averaged and with raw weights. Writes OUTPUT.json, a table OUTPUT.md and a plot OUTPUT.png. Classes are seen by the
support vector machine of scripts/evaluate.py. Needs matplotlib (pip install diffloop[dev]).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

import datasets_lib
from scripts.evaluate import drawn_pictures
from trainers.engine.checkpoint.manifest import list_checkpoints
from trainers.engine.validation.metrics import describe, measure, nearest, pictures_of, train_classifier
from trainers.engine.validation.sampling import evaluation_requests
from trainers.inference.arguments import add_sampling_arguments, overrides_of, trainer_of
from trainers.inference.command import command, positive
from trainers.inference.saved_run import AVERAGED, RAW, open_run

COLUMNS = {
    "class_accuracy": "recognised",
    "worst_class_accuracy": "worst class",
    "class_diversity": "diversity within a class, over real",
    "nearest_distance": "distance to the nearest training picture, median",
    "copies": "nearer than 95 % of held-out ones",
}


def points(arguments: argparse.Namespace) -> list[tuple[str, argparse.Namespace]]:
    """(value, arguments with it) of everything to be measured; ValueError for what cannot be varied."""
    name, _, values = arguments.vary.partition("=")
    if name == "checkpoint":
        changes = [(str(step), {"path": path}) for step, path in reversed(list_checkpoints(arguments.path))]
    elif name in ("guidance", "classifier_scale", "steps"):
        changes = [(value, {name: value}) for value in values.split(",") if value]
    else:
        changes = []
    if not changes:
        wanted = "guidance=, classifier_scale= or steps=A,B,..., or checkpoint for a run with checkpoints"
        raise ValueError(f"--vary {arguments.vary}: must be {wanted}")
    found = [(value, argparse.Namespace(**vars(arguments) | changed)) for value, changed in changes]
    for _, changed in found:  # a mistake shows before the first picture is drawn
        saved = open_run(changed.path)
        saved.config(overrides_of(changed, saved))
    return found


def sweep(arguments: argparse.Namespace) -> Iterator[dict]:
    """A row of metrics for each value and kind of weights."""
    chosen, run, cpu = points(arguments), open_run(arguments.path).config(), torch.device("cpu")
    sets = datasets_lib.build(run.base, "train"), datasets_lib.build(run.base, "validation")
    real, held_out = [describe(pictures_of(s, list(range(len(s))), 500), cpu) if s else None for s in sets]
    if real is None or real.labels is None or not run.trainer_class.Config.__dataclass_fields__.get("num_classes"):
        raise ValueError(f"{arguments.path}: has no classes; only what is drawn by class can be recognised")
    own = nearest(held_out.vectors, real.vectors)[0] if held_out else None
    recognise = train_classifier(real)
    kinds = [arguments.weights] if arguments.weights else [AVERAGED, RAW] if run.config.use_ema else [RAW]
    for value, changed in tqdm(chosen, desc=arguments.vary.partition("=")[0]):
        for changed.weights in kinds:
            _, trainer = trainer_of(changed)
            requests = evaluation_requests(trainer, arguments.number, None)
            if not requests:
                raise ValueError(f"{arguments.path}: its task draws no pictures")
            batches = drawn_pictures(trainer, requests, None, arguments.seed, arguments.batch_size)
            found = measure(describe(batches, trainer.device), real, own, recognise)
            yield {"value": value, "weights": changed.weights} | found


def as_table(name: str, rows: list[dict]) -> str:
    columns = {key: title for key, title in COLUMNS.items() if key in rows[0]}
    lines = [f"| {name} | weights | {' | '.join(columns.values())} |", "|---" * (len(columns) + 2) + "|"]
    for row in rows:
        lines.append(f"| {row['value']} | {row['weights']} | {' | '.join(f'{row[key]:.3f}' for key in columns)} |")
    return "\n".join(lines) + "\n"


def plot(name: str, rows: list[dict], path: Path) -> None:
    """Recognised pictures and diversity against the value, a line for each kind of weights."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for kind in dict.fromkeys(row["weights"] for row in rows):
        own = [row for row in rows if row["weights"] == kind]
        for axis, key in zip(axes, ("class_accuracy", "class_diversity"), strict=True):
            axis.plot([float(row["value"]) for row in own], [row[key] for row in own], marker="o", label=kind)
    for axis, key in zip(axes, ("class_accuracy", "class_diversity"), strict=True):
        axis.set(xlabel=name, ylabel=COLUMNS[key])
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="folder of a run with classes")
    parser.add_argument("--vary", required=True, help="guidance=A,B,..., classifier_scale=, steps=, or checkpoint")
    parser.add_argument("--number", type=positive, default=1000, help="pictures for each row")
    parser.add_argument("--output", type=Path, required=True, help="path of the three files without suffix")
    add_sampling_arguments(parser)
    arguments = parser.parse_intermixed_args()
    name, rows = arguments.vary.partition("=")[0], []
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    for row in sweep(arguments):
        rows.append(row)
        arguments.output.with_suffix(".json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    arguments.output.with_suffix(".md").write_text(as_table(name, rows), encoding="utf-8")
    plot(name, rows, arguments.output.with_suffix(".png"))
    print(as_table(name, rows), end="")


if __name__ == "__main__":
    main()
