"""Draws pictures of a class for prior preservation: scripts/make_class_images.py BASE PROMPT FOLDER [--number 100]

BASE is the pipeline to be trained, a folder or a hub name. Pictures already in FOLDER are kept, and it is filled up to
the number. Under accelerate launch every process draws its share. Then train with
base.class_data_dir=FOLDER base.class_caption=PROMPT
"""

from __future__ import annotations

import argparse

import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from trainers.engine.run.files import make_folder, new_file
from trainers.inference.arguments import DTYPES
from trainers.inference.command import command, keep_settings, path_argument, positive, seed
from trainers.inference.lora_pipeline import load_pipeline

SETTINGS = ".class_images.json"  # hidden, so that it is no part of the data


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="a folder, .safetensors file or hub name of Stable Diffusion or SDXL")
    parser.add_argument("prompt", help="what the pictures show, such as 'a photo of a dog'")
    parser.add_argument("folder", type=path_argument)
    parser.add_argument("--number", type=positive, default=100, help="pictures in total (100)")
    parser.add_argument("--batch-size", type=positive, default=4, help="pictures per batch (4)")
    parser.add_argument("--steps", type=positive, default=50, help="sampling steps (50)")
    parser.add_argument("--resolution", type=positive, help="pixels of a side; default: the pipeline's")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--seed", type=seed, default=0, help="of the first picture; the others count up")
    options = parser.parse_args()
    state = PartialState()
    make_folder(options.folder)
    if state.is_main_process:
        names = ("base", "prompt", "steps", "resolution", "seed", "dtype")
        keep_settings(options.folder / SETTINGS, {name: getattr(options, name) for name in names})
    missing = [n for n in range(options.number) if not (options.folder / f"{n:05d}.png").is_file()]
    state.wait_for_everyone()  # all have looked before the first one writes
    if missing:
        _draw(options, missing[state.process_index :: state.num_processes], state)
    if state.is_main_process:
        print(f"{len(missing)} pictures drawn, {options.number} in all: {options.folder}")


def _draw(options: argparse.Namespace, numbers: list[int], state: PartialState) -> None:
    pipeline = load_pipeline(options.base, DTYPES[options.dtype]).to(state.device)
    pipeline.set_progress_bar_config(disable=True)
    size = {"height": options.resolution, "width": options.resolution} if options.resolution else {}
    starts = range(0, len(numbers), options.batch_size)
    for start in tqdm(starts, desc="drawing", disable=not state.is_main_process):
        chosen = numbers[start : start + options.batch_size]
        generators = [torch.Generator().manual_seed(options.seed + number) for number in chosen]
        prompts = [options.prompt] * len(chosen)
        images = pipeline(prompts, num_inference_steps=options.steps, generator=generators, **size).images
        for number, image in zip(chosen, images, strict=True):
            with new_file(options.folder / f"{number:05d}.png") as file:
                image.save(file, "PNG")


if __name__ == "__main__":
    main()
