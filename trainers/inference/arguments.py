"""Command-line arguments shared by scripts that draw from a run."""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
import yaml

from trainers.base import Section, Trainer
from trainers.engine.config.schema import coerce
from trainers.engine.config.schema import options as options_of
from trainers.inference.command import positive
from trainers.inference.saved_run import SavedRun, load_trainer, open_run

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# argument -> name of the option in a task's section, or its ending, as in ddpm_num_inference_steps
OPTIONS = {
    "steps": "num_inference_steps",
    "sampler": "sampler",
    "guidance": "guidance_scale",
    "guidance_rescale": "guidance_rescale",
    "guidance_interval": "guidance_interval",
    "classes": "valid_classes",
    "classifier": "classifier",
    "classifier_scale": "classifier_scale",
}


def overrides_of(arguments: argparse.Namespace, saved: SavedRun) -> list[str]:
    """Converts the command line to overrides; ValueError for an option that the task lacks."""
    found = []
    for argument, option in OPTIONS.items():
        value = getattr(arguments, argument, None)
        if value is None:
            continue
        known = options_of(saved.trainer_class.Config)
        names = [name for name in known if name == option or name.endswith(f"_{option}")]
        if not names:
            raise ValueError(f"--{argument.replace('_', '-')} {value}: task {saved.task} has no option {option}")
        if argument == "classes":
            value = json.dumps(value.split(","))  # quoted, so that names stay strings
        found.append(f"{saved.task}.{names[0]}=" + (f"[{value}]" if argument == "guidance_interval" else str(value)))
    return [*arguments.overrides, *found]


def pipeline_options(arguments: argparse.Namespace, schema: type[Section]) -> dict[str, Any]:
    """Converts the command line for a pipeline that is not a run, checked by the types of the schema.

    Raises ValueError for an option that pipelines lack.
    """
    if arguments.overrides:
        raise ValueError(f"{arguments.overrides[0]}: is an option of a run, and {arguments.path} is a pipeline")
    known, found = options_of(schema), {}
    for argument, option in (OPTIONS | {"weights": "weights"}).items():
        value = getattr(arguments, argument)
        if value is None:
            continue
        shown = f"--{argument.replace('_', '-')} {value}"
        if option not in known:
            raise ValueError(f"{shown}: is an option of runs, and {arguments.path} is a pipeline")
        try:
            found[option] = coerce(yaml.safe_load(value), known[option].kind)
        except (ValueError, yaml.YAMLError) as allowed:
            raise ValueError(f"{shown}: must be {allowed}") from None
    return found


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="any other option of the run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", help="of the sampler")
    parser.add_argument(
        "--sampler", help="ddpm, ddim or dpmsolver++; euler or dpmsolver++ of a flow; lcm of a pipeline"
    )
    parser.add_argument("--guidance", help="guidance scale; 1: none, 0: no class")
    parser.add_argument("--guidance-rescale", help="in [0, 1]")
    parser.add_argument("--guidance-interval", metavar="LOW,HIGH", help="of the noise level sigma")
    parser.add_argument("--classes", metavar="A,B,...", help="names or numbers; default: all")
    parser.add_argument("--classifier", metavar="RUN", help="a noisy_classifier run, for classifier guidance")
    parser.add_argument("--classifier-scale", help="how strongly it guides")
    parser.add_argument("--weights", choices=["ema", "raw"], help="default: averaged ones if there are any")
    parser.add_argument("--batch-size", type=positive, default=64, help="pictures at once; changes none of them")
    parser.add_argument("--device", help="default: cuda if available")


def trainer_of(arguments: argparse.Namespace) -> tuple[SavedRun, Trainer]:
    """Loads the run at `arguments.path` and its trainer with the options of the command line."""
    saved = open_run(arguments.path)
    return saved, load_trainer(saved, overrides_of(arguments, saved), arguments.weights, arguments.device)
