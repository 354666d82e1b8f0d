"""A new config of a task (`train.py --new`): what must be decided first, then the main options, with their comments."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from datasets_lib.errors import FileError, InputError, MissingFileError
from datasets_lib.foreign import shown
from trainers.engine.config.base_options import OF_CAPTIONS, BaseConfig
from trainers.engine.config.config import find_trainer
from trainers.engine.config.schema import UNDECIDED, Option, options
from trainers.options import Section

SCHEMAS = Path(__file__).resolve().parents[3] / "configs/schema"
ENDINGS = (".yaml", ".yml")

TO_DECIDE = ("train_data_dir", "resolution", "max_train_steps")  # in base; in a task: what it refuses as it is
OF_BASE = (
    "output_dir", "seed", "train_batch_size", "mixed_precision", "checkpointing_steps", "checkpoints_total_limit",
    "valid_epochs", "valid_steps", "validation_split", "logger", "trigger_word", "buckets", "channels", "random_flip",
)  # fmt: skip
OF_TASK = (
    "learning_rate", "lr_scheduler", "valid_batch_size", "model_config", "pretrained_model_name_or_path", "objective",
    "rank", "train_text_encoder", "vae", "num_classes", "decoder_only", "perceptual_loss", "adversarial_loss",
    "caption_dropout", "cache_latents", "cache_text", "validation_prompts", "guidance_scale",
)  # fmt: skip


def write_new_config(task: str, file_name: str) -> str:
    """Writes the YAML config of a task, or of a "package.module:Class"; returns what to do with it.

    Raises ConfigError if there is no such task, InputError for another ending or a file that is there, and FileError
    for a place where it cannot be written.
    """
    path = Path(file_name)
    if path.suffix not in ENDINGS:
        raise InputError(f"{shown(path)}: must end in {' or '.join(ENDINGS)}; JSON has no room for the comments")
    if not path.absolute().parent.is_dir():
        raise MissingFileError(f"{shown(path)}: there is no folder {shown(path.parent)}; make it first")
    text = "\n".join(_lines(task, path)) + "\n"
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise InputError(f"{shown(path)}: exists, and is not overwritten; choose another name") from None
    except OSError as error:
        raise FileError(f"{shown(path)}: cannot be written ({error.strerror})") from None
    return f"{shown(path)}: written; change what says {UNDECIDED}, then: python train.py {shown(path)} --print-config"


def _lines(task: str, path: Path) -> Iterator[str]:
    outside, file = ":" in task, shown(path)
    trainer = find_trainer(task, task if outside else None)
    name = task.partition(":")[0].rpartition(".")[2] if outside else task
    if not outside and (schema := SCHEMAS / f"{name}.json").is_file():
        yield f"# yaml-language-server: $schema={os.path.relpath(schema, path.absolute().parent)}"
    yield f"# {name}: {(trainer.__doc__ or 'a task of your own').splitlines()[0]}"
    yield f"# To decide: all that says {UNDECIDED}. The other values are the defaults, also of lines that are removed;"
    yield f"# `python train.py --describe {task}` lists all options."
    yield f"#   python train.py {file} --print-config    # checks it"
    yield f"#   python train.py {file} --dry-run         # whether it fits, and how long it takes"
    yield f"#   accelerate launch train.py {file}"
    captions = () if trainer.Config.reads_captions else OF_CAPTIONS
    left_out = (*captions, *(() if trainer.Config.takes_buckets else ("buckets",)))
    given = {"output_dir": f"outputs/{path.stem}"} | ({"trainer_class": task} if outside else {})
    yield "base:"
    yield from _section(BaseConfig, TO_DECIDE, {*OF_BASE}.difference(left_out), given)
    yield f"{name}:"
    refused = [option for option, _ in trainer.Config().problems(BaseConfig())]
    yield from _section(trainer.Config, refused, {*OF_TASK}, {})


def _section(section: type[Section], decide: Iterable[str], names: set[str], given: dict[str, Any]) -> Iterator[str]:
    """Yields what must be decided with its alternatives as comments, then the other options in their order."""
    known, decide = options(section), list(decide)
    for name in decide:
        others = [other for group in section.exclusive if name in group for other in group if other != name]
        if others:
            yield f"  # exactly one of {', '.join([name, *others])}:"
        yield f"  {_line(known[name], UNDECIDED)}"
        yield from (f"  # {_line(known[other], UNDECIDED)}" for other in others)
    yield from [""] if decide else []
    for name, option in known.items():
        if name in names.union(given).difference(decide):
            yield f"  {_line(option, given.get(name, option.default))}"


def _line(option: Option, value: Any) -> str:
    return f"{yaml.safe_dump({option.name: value}, width=10**6).strip()}  # {option.comment}"
