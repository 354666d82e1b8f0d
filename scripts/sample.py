"""Draws pictures: scripts/sample.py RUN [section.key=value ...], or a pipeline's folder or hub name with --prompt TEXT

RUN is a run or a checkpoint of any task. Writes grids and every picture (in a folder per class); each PNG holds its
settings, and `scripts/sample.py --again FILE.png` redraws it. The same seed gives the same pictures, whatever the batch
size. Overrides set any option of the run.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from datasets_lib.errors import InputError
from trainers.common.text_to_image.stable_diffusion import StableDiffusionTrainer
from trainers.engine.validation.grids import grid_of, labelled_grid
from trainers.engine.validation.metrics import spread
from trainers.engine.validation.sampling import draw, evaluation_mode
from trainers.inference.again import again
from trainers.inference.animation import write_gif
from trainers.inference.arguments import add_sampling_arguments, saved_run_of, trainer_of
from trainers.inference.command import command, path_argument, positive
from trainers.inference.picture_files import as_pil, below, output_folder, save_picture, settings_of, write_settings
from trainers.inference.prompts import Drawing, add_prompt_arguments, is_pipeline, of_prompts, refuse_prompts, row_names
from trainers.inference.saved_run import SavedRun

BATCH_SIZE = 64  # pictures per batch, unless the task says
GIF_FRAMES = 40  # at most, of the sampling steps


def sample(drawing: Drawing, batches: list[list[int]], seed: int, gif: bool) -> tuple[dict[str, Tensor], Tensor | None]:
    """Draws pictures [N, C, H, W] by name, and with `gif` those after sampling steps, [frames, N, C, H, W]."""
    drawer: Any = drawing.drawer  # a pipeline has what drawing asks of a trainer
    found: dict[str, list[Tensor]] = {}
    frames: list[Tensor] = []
    with evaluation_mode(drawer, lambda steps: tqdm(steps, desc="sampling", leave=False)):
        for numbers in tqdm(batches, desc="batches", disable=len(batches) == 1):
            drawer.frames = [] if gif else None
            for name, images in draw(drawer, drawing.requests, numbers, seed, len(numbers), drawing.held_out).items():
                found.setdefault(name, []).extend(images)
            if drawer.frames:
                frames.append(torch.stack([drawer.frames[n] for n in spread(len(drawer.frames), GIF_FRAMES)]))
    if gif and not frames:
        raise InputError("--gif: this task's sampler shows no steps")
    return {name: torch.cat(images) for name, images in found.items()}, torch.cat(frames, 1) if frames else None


def of_task(arguments: argparse.Namespace, saved: SavedRun) -> Drawing:
    """Prepares drawing what a run of a task without prompts draws at validations."""
    refuse_prompts(arguments, saved.task)
    trainer = trainer_of(arguments, saved)
    trainer.config.valid_batch_size = arguments.number or trainer.config.valid_batch_size
    held_out = None
    if trainer.draws_held_out:
        try:
            held_out = saved.build_data(trainer.base, "validation")
        except (ValueError, OSError) as error:  # such as data that is gone
            print(f"without held-out pictures: {error}", file=sys.stderr)
    requests = trainer.sample_requests(held_out)[: arguments.number]
    if not requests:
        raise InputError(f"task {saved.task} draws no pictures")
    options = dataclasses.asdict(trainer.config)
    return Drawing(trainer, requests, options, class_names=saved.label_names, held_out=held_out)


def write(folder: Path, pictures: dict[str, Tensor], numbers: list[int], drawing: Drawing, settings: dict) -> None:
    """Writes grids as <name>.png, and the pictures as <name>/00000.png or <name>/<class>/00000.png by their numbers."""
    requests = [drawing.requests[number] for number in numbers]
    texts = [request["prompt"] for request in requests] if "prompt" in requests[0] else None
    for title, images in pictures.items():
        name = title.replace(" ", "_")
        grid, size = as_pil(grid_of([images], drawing.drawer.grid_columns, texts)), (images.shape[3], images.shape[2])
        save(grid, folder, f"{name}.png", settings, None, drawing.infotext_of(requests, title, size))
        for number, image, request in zip(numbers, images, requests, strict=True):
            label = request.get("label")
            class_name = "" if label is None else str(drawing.class_names[label] if drawing.class_names else label)
            file = Path(name, re.sub(r"[^\w. -]|^\.", "_", class_name), f"{number:05d}.png")
            save(as_pil(image), folder, file, settings, number, drawing.infotext_of([request], title, size))


def save(
    image: Image.Image, folder: Path, file: str | Path, settings: dict, only: int | None, infotext: str | None = None
) -> None:
    """Saves a picture; `only` is its number, or None for one that shows all of them."""
    pinned = settings["pinned"] | {"only": only}
    save_picture(image, folder / file, settings | {"file": str(file), "pinned": pinned}, infotext)


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="?", help="folder of a run or of one of its checkpoints, or a pipeline")
    parser.add_argument("--number", type=positive, help="pictures; default: one per prompt, or as at a validation")
    add_sampling_arguments(parser)
    add_prompt_arguments(parser)
    parser.add_argument("--gif", action="store_true", help="animate the denoising")
    parser.add_argument("--output-dir", type=path_argument, help="default: RUN/samples/seed-SEED")
    parser.add_argument("--again", type=path_argument, metavar="FILE.png", help="redraw a picture, and compare")
    parser.set_defaults(words=words, only=None, batch_size=None)
    arguments = parser.parse_intermixed_args(words)
    if (arguments.path is None) == (arguments.again is None) or (arguments.again and len(words) > 2):
        parser.error("give a run or a pipeline, or --again FILE.png alone")
    return arguments


def run(arguments: argparse.Namespace) -> str:
    """Draws and writes the pictures that the arguments ask for; returns a line that says so."""
    if arguments.gif and arguments.lora_scales is not None:
        raise InputError("--gif: shows one scale; leave out --lora-scales")
    saved = None if is_pipeline(arguments.path) else saved_run_of(arguments)
    if saved is None or issubclass(saved.trainer_class, StableDiffusionTrainer):
        drawing = of_prompts(arguments, saved)
    else:
        drawing = of_task(arguments, saved)
    source = arguments.path if saved is None else str(saved.checkpoint or saved.folder)
    parent = Path("outputs", "samples", Path(source).name) if saved is None else below(saved.folder, "samples")
    folder = arguments.output_dir or below(parent, f"seed-{arguments.seed}")
    settings = settings_of(["sample", *arguments.words], drawing.files, drawing.drawer.device)
    settings |= {"pinned": {"path": source}, "seed": arguments.seed, "weights": arguments.weights}
    settings["options" if saved is None else saved.task] = drawing.options
    with output_folder(folder, drawing.files) as made:
        draw_into(made, arguments, drawing, settings)
    return f"{len(drawing.requests)} pictures of {source}: {folder}"


def draw_into(folder: Path, arguments: argparse.Namespace, drawing: Drawing, settings: dict[str, Any]) -> None:
    """Draws the pictures, or the batch of the only one wanted, and writes them with their grids."""
    batch_size = arguments.batch_size or drawing.drawer.sample_batch_size or BATCH_SIZE
    batches = [batch.tolist() for batch in torch.arange(len(drawing.requests)).split(batch_size)]
    batches = [batch for batch in batches if arguments.only in (None, *batch)]
    pictures, frames = sample(drawing, batches, arguments.seed, arguments.gif)
    write(folder, pictures, [number for batch in batches for number in batch], drawing, settings)
    if arguments.lora_scales is not None and arguments.only is None:
        grid = labelled_grid(pictures, row_names(drawing.requests, arguments.seed))
        save(as_pil(grid), folder, "lora_scales.png", settings, None)
    if frames is not None:
        grids = [as_pil(grid_of([drawn], drawing.drawer.grid_columns)) for drawn in frames]
        write_gif(grids, folder / "denoising.gif", write_settings(folder / "denoising.json", settings))


@command
def main() -> None:
    arguments = parse(sys.argv[1:])
    print(run(arguments) if arguments.again is None else f"the same pixels: {again(arguments.again)}")


if __name__ == "__main__":
    main()
