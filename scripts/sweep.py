"""Metrics against one setting: scripts/sweep.py RUN --vary guidance=0,1,1.5,2,3 --output docs/digits-guidance

Varies guidance, classifier_scale or steps (of the sampler), or checkpoint (those of the run, without a list), with
averaged and with raw weights. Writes OUTPUT.json, a table OUTPUT.md and a plot OUTPUT.png. Classes are seen by the
support vector machine of scripts/evaluate.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

import datasets_lib
from scripts.evaluate import drawn_pictures
from trainers.engine.inference import AVERAGED, RAW, open_run
from trainers.engine.manifest import list_checkpoints
from trainers.engine.picture_metrics import Described, describe, measure, pictures_of, train_classifier
from trainers.engine.sampling_arguments import add_sampling_arguments, trainer_of

COLUMNS = {
    "class_accuracy": "recognised",
    "worst_class_accuracy": "worst class",
    "class_diversity": "diversity within a class, over real",
    "nearest_distance": "distance to the nearest training picture, median",
    "copies": "nearer than 95 % of held-out ones",
}


def real_pictures(path: Path) -> tuple[Described, Described | None]:
    """The run's training and held-out pictures."""
    base, cpu = open_run(path).run.base, torch.device("cpu")
    sets = datasets_lib.build(base, "train"), datasets_lib.build(base, "validation")
    described = [describe(pictures_of(s, list(range(len(s))), 500), cpu) if s is not None else None for s in sets]
    return described[0], described[1]


def points(arguments: argparse.Namespace) -> list[tuple[str, argparse.Namespace]]:
    """(value, arguments with it) of everything to be measured; ValueError for what cannot be varied."""
    name, _, values = arguments.vary.partition("=")
    if name == "checkpoint":
        folders = [(str(step), {"path": path}) for step, path in reversed(list_checkpoints(arguments.path))]
    elif name in ("guidance", "classifier_scale", "steps") and values:
        folders = [(value, {name: value}) for value in values.split(",")]
    else:
        raise ValueError(
            f"--vary {arguments.vary}: must be guidance=, classifier_scale= or steps=A,B,..., or checkpoint"
        )
    return [(value, argparse.Namespace(**vars(arguments) | changed)) for value, changed in folders]


def sweep(arguments: argparse.Namespace) -> list[dict]:
    """A row of metrics for each value and kind of weights."""
    real, held_out = real_pictures(arguments.path)
    recognise, rows = train_classifier(real), []
    kinds = [arguments.weights] if arguments.weights else [AVERAGED, RAW]
    for value, changed in tqdm(points(arguments), desc=arguments.vary.partition("=")[0]):
        for kind in kinds:
            changed.weights = kind
            _, trainer = trainer_of(changed)
            drawn = describe(
                drawn_pictures(trainer, arguments.number, arguments.seed, arguments.batch_size), trainer.device
            )
            rows.append({"value": value, "weights": kind} | measure(drawn, real, held_out, recognise))
    return rows


def as_table(name: str, rows: list[dict]) -> str:
    columns = {key: title for key, title in COLUMNS.items() if key in rows[0]}
    lines = [f"| {name} | weights | {' | '.join(columns.values())} |", "|---" * (len(columns) + 2) + "|"]
    for row in rows:
        lines.append(f"| {row['value']} | {row['weights']} | {' | '.join(f'{row[key]:.3f}' for key in columns)} |")
    return "\n".join(lines) + "\n"


def plot(name: str, rows: list[dict], path: Path) -> None:
    """Recognised pictures and diversity against the value, a line for each kind of weights."""
    import matplotlib.pyplot as plt

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="folder of a run with classes")
    parser.add_argument("--vary", required=True, help="guidance=A,B,..., classifier_scale=, steps=, or checkpoint")
    parser.add_argument("--number", type=int, default=1000, help="pictures for each row")
    parser.add_argument("--output", type=Path, required=True, help="path of the three files without suffix")
    add_sampling_arguments(parser)
    arguments = parser.parse_intermixed_args()
    try:
        rows = sweep(arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    name = arguments.vary.partition("=")[0]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.with_suffix(".json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    arguments.output.with_suffix(".md").write_text(as_table(name, rows), encoding="utf-8")
    plot(name, rows, arguments.output.with_suffix(".png"))
    print(as_table(name, rows), end="")


if __name__ == "__main__":
    main()
