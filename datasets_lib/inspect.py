"""What the data set of a configuration looks like: python -m datasets_lib.inspect CONFIG [base.key=value ...]

It reads the section `base` and every picture, lists what cannot be used, and writes a contact sheet. Exit code 1 where
the configuration cannot be read or pictures cannot be used.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import datasets_lib
from datasets_lib.checks import one_of
from datasets_lib.images.image_dataset import ImageDataset
from datasets_lib.report.contact_sheet import contact_sheet, spread
from datasets_lib.report.statistics import Line, caption_lines, column_lines, label_lines, picture_lines, scan
from datasets_lib.sources.class_images import PriorDataset

# The data options of BaseConfig, which this package does not import; a test compares them.
DEFAULTS = {
    "seed": 0, "validation_split": None, "dataset_name": None, "dataset_config_name": None, "train_data_dir": None,
    "dataset": None, "dataset_args": {}, "cache_dir": None, "image_column": None, "label_column": None,
    "caption_column": None, "caption": "", "trigger_word": None, "shuffle_tags": False, "keep_tags": 0,
    "mask_column": None, "class_data_dir": None, "class_caption": None, "max_train_samples": None, "resolution": 64,
    "buckets": False, "bucket_max_pixels": None, "bucket_step": 64,
    "channels": 3, "interpolation": "bilinear", "center_crop": False, "random_flip": False,
    "background_color": "white", "bad_images": "error", "max_image_pixels": 178956970, "image_cache_mb": 512,
    "streaming": False, "shuffle_buffer_size": None, "shuffle_buffer_resume": "replay", "shard_retries": 3,
}  # fmt: skip
STREAMED = 1000  # of a stream's examples, its first
SOURCES = ("dataset_name", "train_data_dir", "dataset")


def read_base(path: Path, overrides: Sequence[str]) -> SimpleNamespace:
    """Return the data options of a config file; FileNotFoundError and ValueError say what is wrong with it."""
    if not path.is_file():
        raise FileNotFoundError(f"config file {path} does not exist (searched {path.resolve()})")
    given = [text for text in overrides if text.startswith("base.") and "=" in text]
    if wrong := [text for text in overrides if text not in given]:
        raise ValueError(f"{wrong[0]}: an override reads base.key=value")
    for text in given:
        one_of("the override of base", text.partition("=")[0].removeprefix("base."), DEFAULTS)
    try:
        text = path.read_text(encoding="utf-8")
        document = OmegaConf.create(json.loads(text) if path.suffix == ".json" else text)
        if not isinstance(document.get("base") if isinstance(document, DictConfig) else None, DictConfig):
            raise ValueError(f"{path} has no section `base` with options")
        chosen = OmegaConf.from_dotlist(given).get("base", {})
        if any(chosen.get(name) is not None for name in SOURCES):  # another data set replaces the file's
            for name in (*SOURCES, "dataset_config_name", "dataset_args"):
                document.base.pop(name, None)
        base = OmegaConf.to_container(OmegaConf.merge(document, {"base": chosen}), resolve=True)["base"]
    except (UnicodeDecodeError, json.JSONDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    return _checked({name: value for name, value in base.items() if name in DEFAULTS})


def _checked(values: dict[str, Any]) -> SimpleNamespace:
    for name, value in values.items():
        if DEFAULTS[name] is not None and type(value) is not type(DEFAULTS[name]):
            raise ValueError(f"base.{name} is {value!r}; it must be of the type of {DEFAULTS[name]!r}, its default")
    args = SimpleNamespace(**copy.deepcopy(DEFAULTS) | values)
    found = [name for name in SOURCES if getattr(args, name) is not None]
    if len(found) != 1:
        raise ValueError(
            f"exactly one of {', '.join(SOURCES)} must be set in base, not {' and '.join(found) or 'none'}"
        )
    for option, problem in datasets_lib.problems(args):
        raise ValueError(f"base.{option} is {getattr(args, option)!r}: {problem}")
    return args


def parts(args: SimpleNamespace) -> Iterator[tuple[str, Any]]:
    """Yield the data sets of a configuration by name; the pictures of a class are one of their own."""
    train = datasets_lib.build(args, "train")
    if args.streaming:
        train = train.held(STREAMED)
    yield "train", train.instances if isinstance(train, PriorDataset) else train
    if isinstance(train, PriorDataset):
        yield "class pictures", train.prior
    if (held_out := datasets_lib.build(args, "validation")) is not None:
        yield "validation", held_out


def report(dataset: Any, tokenizer: Any | None, show_progress: bool) -> tuple[list[Line], list[int]]:
    """Return the lines on a data set, and the indices of its usable examples."""
    lines = [("examples", f"{len(dataset):,}"), *(("", note) for note in getattr(dataset, "notes", ()))]
    if not isinstance(dataset, ImageDataset):
        return [*lines, *column_lines(dataset.get(0, None))], list(range(len(dataset)))
    found = scan(dataset.pictures, show_progress)
    usable = [item.position for item in found if item.fault is None]
    if usable:
        lines += column_lines(dataset.get(usable[0], None))
    lines += picture_lines(found, dataset.pictures)
    if dataset.source.labels is not None:
        lines += label_lines([dataset.source.labels[row] for row in dataset.rows], dataset.label_names)
    return [*lines, *caption_lines(dataset, tokenizer)], usable


def load_tokenizer(folder: str) -> Any:
    """Return a tokenizer from a local folder, such as MODEL/tokenizer."""
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"--tokenizer: there is no folder {Path(folder).resolve()}; give MODEL/tokenizer")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ValueError(f"--tokenizer: {folder} holds no tokenizer ({error}); give MODEL/tokenizer") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: returns 0, or 1 where the data cannot be had or pictures cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="JSON or YAML file with a section `base`")
    parser.add_argument("overrides", nargs="*", metavar="base.key=value", help="replaces what the file says")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="count the captions' tokens too")
    parser.add_argument("--output", type=Path, default=Path("inspect.png"), help="contact sheet (inspect.png)")
    options = parser.parse_intermixed_args(arguments)
    try:
        return inspect(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def inspect(options: argparse.Namespace) -> int:
    """Print the report and write the contact sheet; ValueError and OSError for what cannot be read."""
    if options.output.suffix.lower() != ".png" or not options.output.parent.is_dir():
        raise ValueError(f"--output: {options.output} must be a .png file in a folder that exists")
    args = read_base(options.config, options.overrides)
    tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else None
    bad = 0
    for name, dataset in parts(args):
        lines, usable = report(dataset, tokenizer, show_progress=sys.stderr.isatty())
        print(f"{name}:", *(f"  {title:14} {text}" for title, text in lines), sep="\n")
        bad += len(dataset) - len(usable)
        if name == "train" and usable and "image" in dataset.get(usable[0], None):
            contact_sheet(dataset, spread(usable)).save(options.output)
            print(f"  {'contact sheet':14} {options.output}")
    if bad:
        print(f"\n{bad:,} pictures cannot be used, see above: repair or remove them, or set base.bad_images=skip")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
