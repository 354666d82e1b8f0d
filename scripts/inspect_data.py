"""Shows what a run's data looks like: scripts/inspect_data.py CONFIG [section.key=value ...], as for train.py

Reads every picture, lists those that cannot be used, and writes a contact sheet: pictures as a network sees them, each
with its number and caption below. Exit code 1 if the configuration cannot be read or pictures cannot be used.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

import datasets_lib
from datasets_lib.errors import InputError, MissingFileError
from datasets_lib.example import StreamData
from datasets_lib.images.image_dataset import ImageDataset
from datasets_lib.report.statistics import Line, caption_lines, column_lines, label_lines, picture_lines, scan
from datasets_lib.sources.class_images import PriorDataset
from trainers.engine.config.base_options import BaseConfig
from trainers.engine.config.config import load_config
from trainers.engine.config.trust import add_trust_argument
from trainers.engine.run.files import new_file
from trainers.engine.validation.metrics import spread
from trainers.inference.animation import centred, contact_sheet
from trainers.inference.command import command, path_argument
from trainers.inference.picture_files import as_pil
from trainers.pretrained import read_part

PICTURES, COLUMNS = 48, 8  # of the contact sheet
STREAMED = 1000  # first examples of a stream


def parts(base: BaseConfig) -> Iterator[tuple[str, Any]]:
    """Yields the data sets of a configuration by name, with class pictures as a separate one."""
    train = datasets_lib.build(base, "train")
    if isinstance(train, PriorDataset):
        yield from (("train", train.instances), ("class pictures", train.prior))
    else:
        yield "train", train.held(STREAMED) if isinstance(train, StreamData) else train
    if (held_out := datasets_lib.build(base, "validation")) is not None:
        yield "validation", held_out


def report(dataset: Any, tokenizer: Any | None, show_progress: bool) -> tuple[list[Line], list[int], int]:
    """Returns the lines on a data set, an example of each usable picture, and how many pictures are not usable."""
    notes = [("", note) for note in dataset.notes]
    if not isinstance(dataset, ImageDataset):
        examples: Line = ("examples", f"{len(dataset):,}")
        return [examples, *notes, *column_lines(dataset.get(0, None))], list(range(len(dataset))), 0
    repeated = f", of {len(dataset.pictures):,} pictures" if len(dataset.pictures) < len(dataset) else ""
    lines = [("examples", f"{len(dataset):,}{repeated}"), *notes]
    found = scan(dataset.pictures, show_progress)
    first = {place: index for index, place in reversed(list(enumerate(dataset.places)))}
    usable = [first[item.position] for item in found if item.fault is None]
    if usable:
        lines += column_lines(dataset.get(usable[0], None))
    lines += picture_lines(found, dataset.pictures)
    if dataset.source.labels is not None:
        lines += label_lines([dataset.source.labels[row] for row in dataset.rows], dataset.label_names)
    elif dataset.no_labels is not None:
        lines.append(("labels", f"none: {dataset.no_labels}"))
    return [*lines, *caption_lines(dataset, tokenizer)], usable, len(found) - len(usable)


def load_tokenizer(folder: str) -> Any:
    """Returns a tokenizer from a local folder, such as MODEL/tokenizer."""
    if not Path(folder).is_dir():
        raise MissingFileError(f"--tokenizer: there is no folder {Path(folder).resolve()}; give MODEL/tokenizer")
    from transformers import AutoTokenizer

    try:
        return read_part(AutoTokenizer, folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f"--tokenizer: {folder} holds no tokenizer ({error}); give MODEL/tokenizer") from None


def sheet_of(dataset: Any, indices: list[int]) -> Image.Image:
    """Arranges the examples' pictures in rows; without randomness, as in validation."""
    examples = [dataset.get(index, None) for index in indices]
    texts = [f"{index} {example.get('caption', '')}" for index, example in zip(indices, examples, strict=True)]
    return contact_sheet(centred([as_pil(example["image"] / 2 + 0.5) for example in examples]), COLUMNS, texts)


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=path_argument, help="config of any run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces an option of the config")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="also count the captions' tokens")
    parser.add_argument("--output", type=path_argument, default=Path("inspect.png"), help="contact sheet (inspect.png)")
    add_trust_argument(parser)
    options = parser.parse_intermixed_args()
    if options.output.suffix.lower() != ".png" or not options.output.parent.is_dir():
        raise InputError(f"--output: {options.output} must be a .png file in a folder that exists")
    base = load_config(options.config, options.overrides, datasets_lib.problems, options.trust_code).base
    tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else None
    bad = 0
    for name, dataset in parts(base):
        lines, usable, unusable = report(dataset, tokenizer, show_progress=sys.stderr.isatty())
        print(f"{name}:", *(f"  {title:14} {text}" for title, text in lines), sep="\n")
        bad += unusable
        if name == "train" and usable and "image" in dataset.get(usable[0], None):
            sheet = sheet_of(dataset, [usable[place] for place in spread(len(usable), PICTURES)])
            with new_file(options.output) as file:
                sheet.save(file, "PNG")
            print(f"  {'contact sheet':14} {options.output}")
    if bad:
        print(f"\n{bad:,} pictures cannot be used, see above: repair or remove them, or set base.bad_images=skip")
        sys.exit(1)


if __name__ == "__main__":
    main()
