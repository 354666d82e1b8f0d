"""Turns a data set into cached latents: scripts/encode.py VAE CONFIG OUTPUT [base.key=value ...]

VAE is a finished vae run, or another AutoencoderKL's folder or hub name; CONFIG is any run's configuration, of which
the section `base` says what the pictures are. Writes OUTPUT/train and OUTPUT/validation: means and log-variances of
the posteriors, labels and captions. To train on them: base.dataset=latents base.dataset_args.path=OUTPUT, with
base.validation_split=validation where that was written, and the same VAE as the task's option `vae`.
"""

from __future__ import annotations

import argparse
import json
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

import datasets_lib
from datasets_lib.images.source import digest
from datasets_lib.sources.latents import FORMAT, INDEX
from trainers.common.autoencoder.latents import LatentSpace, encode, latents_problems
from trainers.engine.config.base_options import BaseConfig
from trainers.engine.config.config import load_config
from trainers.engine.run.files import sha256
from trainers.inference.arguments import DTYPES, positive
from trainers.inference.saved_run import find_device


class Encoded(NamedTuple):
    """A run of examples: their posteriors and columns."""

    tensors: dict[str, Tensor]  # mean, logvar: float32 [N, c, h, w]
    labels: list[int]  # empty where the data set has none
    captions: list[str]


def shards(dataset: Any, size: int, batch_size: int, space: LatentSpace) -> Iterator[Encoded]:
    """Yields at most `size` examples at a time."""
    bar = tqdm(total=len(dataset), desc="encoding", unit="picture")
    for start in range(0, len(dataset), size):
        parts, labels, captions = {"mean": [], "logvar": []}, [], []
        for first in range(start, min(start + size, len(dataset)), batch_size):
            numbers = range(first, min(first + batch_size, start + size, len(dataset)))
            examples = [dataset.get(number, None) for number in numbers]
            images = torch.stack([example["image"] for example in examples])
            for name, rows in encode(space.vae, images.to(space.device)).items():
                parts[name].append(rows.cpu())
            labels += [example["label"] for example in examples if "label" in example]
            captions += [example.get("caption", "") for example in examples]
            bar.update(len(numbers))
        yield Encoded({name: torch.cat(rows) for name, rows in parts.items()}, labels, captions)


def write_split(dataset: Any, base: BaseConfig, space: LatentSpace, folder: Path, options: argparse.Namespace) -> None:
    """Writes one split; the index comes last, so that what was begun and not ended is no data set."""
    folder.mkdir(parents=True)
    files, hashes, labels, captions, start = [], [], [], [], 0
    for shard in shards(dataset, options.shard_size, options.batch_size, space):
        name = f"latents-{len(files):05d}.safetensors"
        tensors = {key: rows.to(DTYPES[options.dtype]).contiguous() for key, rows in shard.tensors.items()}
        save_file(tensors, folder / name)
        files.append({"file": name, "start": start})
        hashes.append(sha256(folder / name))
        labels, captions, start = labels + shard.labels, captions + shard.captions, start + len(tensors["mean"])
    captions = captions if any(captions) else []
    index = {"format": FORMAT, "examples": len(dataset), "resolution": base.resolution, "channels": base.channels}
    index |= {"shape": list(space.shape), "encoded_by": space.digest, "shards": files, "labels": labels}
    index |= {"captions": captions, "label_names": getattr(dataset, "label_names", None)}
    index |= {"fingerprint": digest(dataset.fingerprint, *hashes, labels, captions)}
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vae", help="a finished vae run, or another folder or hub name of an AutoencoderKL")
    parser.add_argument("config", type=Path, help="a configuration; its section base says what the data is")
    parser.add_argument("output", type=Path, help="a new folder")
    parser.add_argument("overrides", nargs="*", metavar="base.key=value")
    parser.add_argument("--batch-size", type=positive, default=16, help="pictures at once")
    parser.add_argument("--shard-size", type=positive, default=10_000, help="pictures per file")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the files")
    parser.add_argument("--device", help="default: cuda where there is one")
    options = parser.parse_intermixed_args()
    staging = options.output.with_name(f".tmp-{options.output.name}-{secrets.token_hex(4)}")
    try:
        if options.output.exists():
            raise ValueError(f"{options.output}: exists; choose a new folder")
        base = load_config(options.config, options.overrides, datasets_lib.problems).base
        if base.buckets:
            raise ValueError("base.buckets = true: the rows of a file have one shape; set it to false")
        if base.random_flip:
            raise ValueError("base.random_flip = true: latents of mirrored pictures are not written; set it to false")
        for problem in latents_problems(options.vae):
            raise ValueError(f"VAE = {options.vae}: {problem}")
        if not base.center_crop:
            print("every picture is cropped in the middle, as base.center_crop: true does it")
        space = LatentSpace("VAE", options.vae, base, find_device(options.device), torch.float32)
        for split in ("train", "validation"):
            dataset = datasets_lib.build(base, split)
            if dataset is not None:
                write_split(dataset, base, space, staging / split, options)
        staging.rename(options.output)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    print(f"latents {list(space.shape)}: {options.output}")


if __name__ == "__main__":
    main()
