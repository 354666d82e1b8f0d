"""Turns a data set into shards to stream: scripts/shard.py FOLDER_OR_CONFIG --output-dir DIR [base.key=value ...]

FOLDER_OR_CONFIG is a value of base.train_data_dir, or a run's configuration, whose section `base` says what the data
is. Pictures, masks, labels and captions are copied as they are, in a random order by base.seed; a validation split goes
to a sub-folder. With --latents VAE (a finished vae run, or another AutoencoderKL) the posteriors of the pictures'
centres are written instead. To train on them: base.train_data_dir=DIR base.streaming=true base.max_train_steps=N.

`accelerate launch scripts/shard.py ...` or torchrun divides the shards among processes. An interrupted call continues
with the same options: complete shards are kept. Only one call at a time can write to a folder.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save

import datasets_lib
from datasets_lib.errors import InputError, MissingFileError
from datasets_lib.foreign import read_json, shown
from datasets_lib.images.files import TEXT_BYTES
from datasets_lib.images.image_dataset import ImageDataset
from datasets_lib.streaming.index import FORMAT, INDEX, SETTINGS
from datasets_lib.streaming.writing import SUFFIXES, Columns, example_of, write_shard
from trainers.common.autoencoder.latents import LatentSpace, encode, latents_problems
from trainers.engine.config.base_options import BaseConfig
from trainers.engine.config.config import load_config
from trainers.engine.config.trust import add_trust_argument
from trainers.engine.distributed.collectives import run_on_all, run_on_main
from trainers.engine.run.files import flush, make_folder, write_text
from trainers.engine.run.run_folder import LOCK, lock_folder
from trainers.inference.arguments import DTYPES
from trainers.inference.command import command, keep_settings, path_argument, positive

LARGEST, LEAST_SHARDS = 10_000, 8  # examples of a shard, and shards of a data set, if --shard-size does not say


def read_base(source: Path, overrides: list[str], trust_code: bool) -> BaseConfig:
    """Reads section `base` of a configuration, or makes one for data; ValueError for options that do not fit."""
    if source.is_dir() or source.suffix == ".jsonl":
        if overrides:
            raise InputError(f"{overrides[0]}: overrides go with a configuration, and {source} is data")
        return BaseConfig(train_data_dir=str(source))
    if not source.exists():
        raise MissingFileError(f"{shown(source)}: there is neither a folder nor a configuration of this name")
    base = load_config(source, overrides, datasets_lib.problems, trust_code).base
    for option in ("streaming", "has_class_images"):
        if getattr(base, option):
            raise InputError(f"base.{option} = {getattr(base, option)}: cannot be put into shards; unset it")
    return base


def shard_size(dataset: ImageDataset, options: Any) -> int:
    """Returns the examples per shard; without --shard-size, few enough that there are shards for several readers."""
    return options.shard_size or min(LARGEST, max(len(dataset) // LEAST_SHARDS, 1))


def settings_of(dataset: ImageDataset, base: BaseConfig, space: LatentSpace | None, options: Any) -> dict[str, Any]:
    """Returns the settings that decide the shards of a split; a folder holds those of one split."""
    found = {"format": FORMAT, "kind": options.format, "seed": base.seed}
    found["shard_size"] = shard_size(dataset, options)
    found["data"] = dataset.fingerprint
    if space is not None:
        found |= {"encoded_by": space.digest, "dtype": options.dtype}
        names = ("resolution", "channels", "interpolation", "background_color")
        found |= {name: getattr(base, name) for name in names}
    return found


def lock(folder: Path, held: ExitStack) -> None:
    """Makes the folder, and locks it until `held` is closed; ValueError if another call has locked it."""
    make_folder(folder)
    file = lock_folder(folder, "--output-dir")
    if file is not None:
        held.enter_context(file)


def prepare_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Makes the folder; ValueError if it holds shards with other settings, or other files."""
    make_folder(folder)
    if not (folder / SETTINGS).is_file() and any(path.name != LOCK for path in folder.iterdir()):
        raise InputError(f"{folder}: is not empty, and scripts/shard.py did not write it; choose a new folder")
    keep_settings(folder / SETTINGS, settings)


def write_shards(
    accelerator: Accelerator, dataset: ImageDataset, space: LatentSpace | None, folder: Path, options: Any, seed: int
) -> None:
    """Writes this process's shards, each followed by its record; shards with a record are kept."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    size = shard_size(dataset, options)
    starts = range(0, len(order), size)
    for number in range(accelerator.process_index, len(starts), accelerator.num_processes):
        path = folder / f"shard-{number:05}{SUFFIXES[options.format]}"
        record = folder / f".{path.name}.json"
        if is_whole(path, record):
            continue
        indices = order[starts[number] : starts[number] + size]
        staged = folder / f".tmp-{path.name}"
        write_shard(staged, examples_of(dataset, indices, space, options), options.format, dataset.source)
        flush(staged)
        staged.rename(path)
        flush(folder)
        labels = [dataset.source.labels[dataset.rows[index]] for index in indices] if dataset.source.labels else []
        about = {"file": path.name, "bytes": path.stat().st_size, "examples": len(indices)}
        write_text(record, json.dumps(about | {"highest_label": max(labels, default=None)}))
        print(f"{path}: {len(indices):,} examples", flush=True)


def is_whole(path: Path, record: Path) -> bool:
    """Whether a shard was finished: its file has the size that its record says."""
    try:
        return read_json(record, TEXT_BYTES)["bytes"] == path.stat().st_size
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # such as a record cut off by a power loss
        return False


def examples_of(
    dataset: ImageDataset, indices: list[int], space: LatentSpace | None, options: Any
) -> Iterator[Columns]:
    if space is None:
        yield from (example_of(dataset, index) for index in indices)
        return
    for first in range(0, len(indices), options.batch_size):
        numbers = indices[first : first + options.batch_size]
        images = torch.stack([dataset.get(number, None)["image"] for number in numbers])
        rows = {name: each.to("cpu", DTYPES[options.dtype]) for name, each in encode(space.vae, images).items()}
        for place, number in enumerate(numbers):
            own = {name: each[place].clone(memory_format=torch.contiguous_format) for name, each in rows.items()}
            yield example_of(dataset, number, save(own))


def write_index(folder: Path, dataset: ImageDataset, settings: dict[str, Any], shape: list[int] | None) -> None:
    """Writes the index of the shards last, so that an unfinished folder is not a data set."""
    records = [read_json(path, TEXT_BYTES) for path in sorted(folder.glob(".shard-*.json"))]
    highest = [record.pop("highest_label") for record in records]
    about = {"format": FORMAT, "examples": len(dataset), "label_names": dataset.label_names, "shards": records}
    about["highest_label"] = max((label for label in highest if label is not None), default=None)
    if shape is not None:
        about |= {"shape": shape} | {key: settings[key] for key in ("encoded_by", "resolution", "channels")}
    write_text(folder / INDEX, json.dumps(about))
    flush(folder / INDEX)


def shard_split(accelerator: Accelerator, base: BaseConfig, split: str, space: Any, options: Any) -> None:
    dataset = datasets_lib.build(base, split)
    if dataset is None:
        return
    if not isinstance(dataset, ImageDataset):
        raise InputError(f"base.dataset = {base.dataset}: holds no picture files to put into shards")
    name = base.validation_split if isinstance(base.validation_split, str) else "validation"
    folder = options.output_dir if split == "train" else options.output_dir / name
    settings = settings_of(dataset, base, space, options)
    run_on_main(accelerator, lambda: prepare_folder(folder, settings))
    run_on_all(accelerator, lambda: write_shards(accelerator, dataset, space, folder, options, base.seed))
    shape = None if space is None else list(space.grid.shape)
    run_on_main(accelerator, lambda: write_index(folder, dataset, settings, shape))
    words = ""
    if dataset.source.trigger_words is not None:
        words = "; captions begin with the trigger words of their folders: train on them without base.trigger_word, "
        words += "and with base.keep_tags one higher if tags are shuffled"
    accelerator.print(f"{folder}: {len(dataset):,} examples{words}")


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=path_argument, metavar="FOLDER_OR_CONFIG")
    parser.add_argument("overrides", nargs="*", metavar="base.key=value")
    parser.add_argument("--output-dir", type=path_argument, required=True, help="a new folder, or one to continue")
    parser.add_argument("--format", choices=SUFFIXES, default="parquet", help="of the shards (parquet)")
    parser.add_argument(
        "--shard-size", type=positive, help=f"examples per shard ({LARGEST}, or fewer for {LEAST_SHARDS} shards)"
    )
    parser.add_argument("--latents", metavar="VAE", help="a finished vae run, or another folder or hub name")
    parser.add_argument("--batch-size", type=positive, default=16, help="pictures to encode per batch (16)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the latents (float32)")
    add_trust_argument(parser)
    options = parser.parse_intermixed_args()
    accelerator = Accelerator()
    base = read_base(options.source, options.overrides, options.trust_code)
    space = None
    if options.latents is not None:
        for problem in latents_problems(options.latents):
            raise InputError(f"--latents = {options.latents}: {problem}")
        if base.buckets or base.random_flip:
            raise InputError("base.buckets and base.random_flip: latents are of unflipped pictures of one size")
        space = LatentSpace("--latents", options.latents, base, accelerator.device, torch.float32)
    with ExitStack() as held:
        run_on_main(accelerator, lambda: lock(options.output_dir, held))
        for split in ("train", "validation"):
            shard_split(accelerator, base, split, space, options)
    accelerator.end_training()


if __name__ == "__main__":
    main()
