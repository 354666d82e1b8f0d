"""Draws pictures of a class for prior preservation: scripts/make_class_images.py BASE PROMPT FOLDER [--number 100]

BASE is the pipeline that is to be trained, a folder or a hub name. Pictures that FOLDER holds already are kept: it is
filled up to the number. Under accelerate launch every process draws its share. Then:
base.class_data_dir=FOLDER base.class_caption=PROMPT
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from trainers.inference.arguments import DTYPES
from trainers.inference.command import command, positive

SETTINGS = ".class_images.json"  # hidden, so that it is no part of the data


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="folder or hub name of a pipeline")
    parser.add_argument("prompt", help="what the pictures show, such as 'a photo of a dog'")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--number", type=positive, default=100, help="pictures in all")
    parser.add_argument("--batch-size", type=positive, default=4, help="pictures at once")
    parser.add_argument("--steps", type=positive, default=50, help="of the sampler")
    parser.add_argument("--resolution", type=positive, help="pixels of a side; default: the pipeline's")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture; each has its own")
    options = parser.parse_args()
    state = PartialState()
    options.folder.mkdir(parents=True, exist_ok=True)
    if state.is_main_process:
        _remember(options)
    missing = [n for n in range(options.number) if not (options.folder / f"{n:05d}.png").is_file()]
    state.wait_for_everyone()  # all have looked before the first one writes
    if missing:
        _draw(options, missing[state.process_index :: state.num_processes], state)
    if state.is_main_process:
        print(f"{len(missing)} pictures drawn, {options.number} in all: {options.folder}")


def _remember(options: argparse.Namespace) -> None:
    """Notes how the folder's pictures are drawn; ValueError where those that are there were drawn otherwise."""
    settings = {name: getattr(options, name) for name in ("base", "prompt", "steps", "resolution", "seed", "dtype")}
    path = options.folder / SETTINGS
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else settings
    for name, value in settings.items():
        if before.get(name) != value:
            found = f"its pictures were drawn with {name} = {before.get(name)!r}, and {value!r} is asked for"
            raise ValueError(f"{options.folder}: {found}; choose a new folder")
    path.write_text(json.dumps(settings, indent=1), encoding="utf-8")


def _draw(options: argparse.Namespace, numbers: list[int], state: PartialState) -> None:
    pipeline = DiffusionPipeline.from_pretrained(
        options.base, torch_dtype=DTYPES[options.dtype], use_safetensors=True, safety_checker=None
    ).to(state.device)
    pipeline.set_progress_bar_config(disable=True)
    size = {"height": options.resolution, "width": options.resolution} if options.resolution else {}
    starts = range(0, len(numbers), options.batch_size)
    for start in tqdm(starts, desc="drawing", disable=not state.is_main_process):
        chosen = numbers[start : start + options.batch_size]
        generators = [torch.Generator().manual_seed(options.seed + number) for number in chosen]
        prompts = [options.prompt] * len(chosen)
        images = pipeline(prompts, num_inference_steps=options.steps, generator=generators, **size).images
        for number, image in zip(chosen, images, strict=True):
            staged = options.folder / f".{number:05d}.png"
            image.save(staged)
            staged.rename(options.folder / f"{number:05d}.png")  # what was begun is no picture


if __name__ == "__main__":
    main()
