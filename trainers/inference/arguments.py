"""Command-line arguments shared by scripts that draw from a run."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from datasets_lib.errors import InputError
from trainers.base import Section, Trainer
from trainers.engine.config.schema import coerce
from trainers.engine.config.schema import options as options_of
from trainers.engine.config.trust import add_trust_argument
from trainers.inference.command import positive, seed
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


def given(arguments: argparse.Namespace, options: Mapping[str, str] = OPTIONS) -> Iterator[tuple[str, str, str]]:
    """Yields, for each argument of the command line that is not left out, option, value and the words to show."""
    for argument, option in options.items():
        value = getattr(arguments, argument)
        if value is not None:
            yield option, value, f"--{argument.replace('_', '-')} {value}"


def overrides_of(arguments: argparse.Namespace, saved: SavedRun) -> list[str]:
    """Converts the command line to overrides; ValueError for an option that the task lacks."""
    known, found = options_of(saved.trainer_class.Config), list(arguments.overrides)
    for option, value, shown in given(arguments):
        names = [name for name in known if name == option or name.endswith(f"_{option}")]
        if not names:
            raise InputError(f"{shown}: task {saved.task} has no option {option}")
        if option == "valid_classes":
            value = json.dumps(value.split(","))  # quoted, so that names stay strings
        elif option == "guidance_interval":
            value = f"[{value}]"
        found.append(f"{saved.task}.{names[0]}={value}")
    return found


def pipeline_options(arguments: argparse.Namespace, schema: type[Section]) -> dict[str, Any]:
    """Converts the command line for a pipeline that is not a run; ValueError for what does not fit the schema."""
    if arguments.overrides:
        raise InputError(f"{arguments.overrides[0]}: is an option of a run, and {arguments.path} is a pipeline")
    known, found = options_of(schema), {}
    for option, value, shown in given(arguments, OPTIONS | {"weights": "weights"}):
        if option not in known:
            raise InputError(f"{shown}: is an option of runs, and {arguments.path} is a pipeline")
        try:
            found[option] = coerce(yaml.safe_load(value), known[option].kind)
        except (ValueError, yaml.YAMLError) as allowed:
            raise InputError(f"{shown}: must be {allowed}") from None
    return found


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="any other option of the run")
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--steps", help="number of sampling steps")
    parser.add_argument("--sampler", help="ddpm, ddim or dpmsolver++; flow: euler, dpmsolver++; pipeline: any, or lcm")
    parser.add_argument("--guidance", help="guidance scale; 1: no guidance, 0: no class")
    parser.add_argument("--guidance-rescale", help="in [0, 1]")
    parser.add_argument("--guidance-interval", metavar="LOW,HIGH", help="noise levels (sigma) at which to guide")
    parser.add_argument("--classes", metavar="A,B,...", help="names or numbers; default: all")
    parser.add_argument("--classifier", metavar="RUN", help="a noisy_classifier run, for classifier guidance")
    parser.add_argument("--classifier-scale", help="strength of classifier guidance")
    parser.add_argument("--weights", choices=["ema", "raw"], help="default: averaged ones if there are any")
    parser.add_argument("--batch-size", type=positive, default=64, help="pictures per batch; does not change them")
    parser.add_argument("--device", help="default: cuda if available")
    add_trust_argument(parser)


def saved_run_of(arguments: argparse.Namespace, path: str | Path | None = None) -> SavedRun:
    """Opens the run of the command line, or another one with the same trust in code."""
    return open_run(Path(path or arguments.path), arguments.trust_code, arguments.overrides)


def trainer_of(arguments: argparse.Namespace, saved: SavedRun) -> Trainer:
    """Loads the trainer of a run with the options of the command line."""
    return load_trainer(saved, overrides_of(arguments, saved), arguments.weights, arguments.device)
