"""Draws pictures: scripts/sample.py RUN [section.key=value ...], or a pipeline's folder or hub name with --prompt TEXT

RUN is a run or a checkpoint of any task. Writes grids and every picture (in a folder per class); each PNG
holds what it was made with, and `scripts/sample.py --again FILE.png` draws it once more. Same seed, same pictures,
whatever the batch size. Overrides set any option of the run.
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

sys.path.insert(0, str(Path(__file__).parents[1]))

import datasets_lib
from trainers.base import Trainer
from trainers.common.text_to_image.stable_diffusion import StableDiffusionTrainer
from trainers.engine.validation.grids import grid_of, labelled_grid
from trainers.engine.validation.metrics import spread
from trainers.engine.validation.sampling import draw, evaluation_mode
from trainers.inference.again import again
from trainers.inference.arguments import add_sampling_arguments, overrides_of
from trainers.inference.command import command, positive
from trainers.inference.output_folder import output_folder
from trainers.inference.picture_files import as_pil, save_picture, settings_of, write_settings
from trainers.inference.prompts import Drawing, add_prompt_arguments, is_pipeline, of_prompts, refuse_prompts, row_names
from trainers.inference.saved_run import SavedRun, load_trainer, open_run

BATCH_SIZE = 64  # pictures at once, where a task does not say
GIF_FRAMES = 40  # at most, of the steps of the sampler
GIF_SECONDS = 2.0  # for the last frame


def batches_of(count: int, batch_size: int, only: int | None) -> list[list[int]]:
    """The numbers of the pictures, batch by batch; of a single one those that it is drawn with."""
    batches = [list(range(n, min(n + batch_size, count))) for n in range(0, count, batch_size)]
    return [batch for batch in batches if only is None or only in batch]


def sample(drawing: Drawing, batches: list[list[int]], seed: int, gif: bool) -> tuple[dict[str, Tensor], Tensor | None]:
    """Pictures [N, C, H, W] by name, and with `gif` those after steps of the sampler, [frames, N, C, H, W]."""
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
        raise ValueError("--gif: this task's sampler shows no steps")
    return {name: torch.cat(images) for name, images in found.items()}, torch.cat(frames, 1) if frames else None


def of_task(arguments: argparse.Namespace, saved: SavedRun) -> Drawing:
    """Describes what a run of a task without prompts draws at validations."""
    refuse_prompts(arguments, saved.task)
    trainer = load_trainer(saved, overrides_of(arguments, saved), arguments.weights, arguments.device)
    trainer.config.valid_batch_size = arguments.number or trainer.config.valid_batch_size
    held_out = held_out_set(trainer)
    requests = trainer.sample_requests(held_out)[: arguments.number]
    if not requests:
        raise ValueError(f"task {saved.task} draws no pictures")
    options = dataclasses.asdict(trainer.config)
    source, folder = str(saved.checkpoint or saved.folder), saved.folder / "samples"
    return Drawing(trainer, requests, source, folder, options, names=saved.label_names, held_out=held_out)


def held_out_set(trainer: Trainer) -> Any | None:
    """The run's validation set, where the task draws from it; None where its data is gone."""
    if not trainer.draws_held_out:
        return None
    try:
        return datasets_lib.build(trainer.base, "validation")
    except (ValueError, OSError) as error:
        print(f"without held-out pictures: {error}", file=sys.stderr)
        return None


def write_gif(frames: Tensor, columns: int | None, path: Path) -> None:
    """An animation of grids, of [frames, N, C, H, W]; it holds the last one."""
    grids = [as_pil(grid_of([pictures], columns)) for pictures in frames]
    durations = [60] * (len(grids) - 1) + [int(GIF_SECONDS * 1000)]
    grids[0].save(path, save_all=True, append_images=grids[1:], duration=durations, loop=0)


def write(folder: Path, pictures: dict[str, Tensor], numbers: list[int], drawing: Drawing, settings: dict) -> None:
    """<name>.png is the grid, <name>/00000.png or <name>/<class>/00000.png are the pictures with these numbers."""
    requests = [drawing.requests[number] for number in numbers]
    texts = [request["prompt"] for request in requests] if "prompt" in requests[0] else None
    for title, images in pictures.items():
        name = title.replace(" ", "_")
        grid = as_pil(grid_of([images], drawing.drawer.grid_columns, texts))
        save(grid, folder, f"{name}.png", settings, None)
        for number, image, request in zip(numbers, images, requests, strict=True):
            label = request.get("label")
            class_name = "" if label is None else str(drawing.names[label] if drawing.names else label)
            file = Path(name, re.sub(r"[^\w. -]|^\.", "_", class_name), f"{number:05d}.png")
            save(as_pil(image), folder, file, settings, number)


def save(image: Image.Image, folder: Path, file: str | Path, settings: dict, only: int | None) -> None:
    """`only` is the number of the picture, None of what shows all of them."""
    pinned = settings["pinned"] | {"only": only}
    save_picture(image, folder / file, settings | {"file": str(file), "pinned": pinned})


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="?", help="folder of a run, of one of its checkpoints, or a pipeline")
    parser.add_argument("--number", type=positive, help="pictures; default: as many as at a validation, or prompts")
    add_sampling_arguments(parser)
    add_prompt_arguments(parser)
    parser.add_argument("--gif", action="store_true", help="animate the denoising")
    parser.add_argument("--output-dir", type=Path, help="default: RUN/samples/seed-SEED")
    parser.add_argument("--again", type=Path, metavar="FILE.png", help="draw a picture once more, and compare")
    parser.set_defaults(words=words, only=None, batch_size=None)
    arguments = parser.parse_intermixed_args(words)
    if (arguments.path is None) == (arguments.again is None) or (arguments.again and len(words) > 2):
        parser.error("give a run or a pipeline, or --again FILE.png alone")
    return arguments


def run(arguments: argparse.Namespace) -> str:
    """Draws and writes what is asked for; says what."""
    if arguments.gif and arguments.lora_scales is not None:
        raise ValueError("--gif: shows one scale; leave out --lora-scales")
    saved = None if is_pipeline(arguments.path) else open_run(Path(arguments.path))
    if saved is None or issubclass(saved.trainer_class, StableDiffusionTrainer):
        drawing = of_prompts(arguments, saved)
    else:
        drawing = of_task(arguments, saved)
    folder = arguments.output_dir or drawing.folder / f"seed-{arguments.seed}"
    with output_folder(folder, drawing.files) as made:
        draw_into(made, arguments, drawing, saved)
    return f"{len(drawing.requests)} pictures of {drawing.source}: {folder}"


def draw_into(folder: Path, arguments: argparse.Namespace, drawing: Drawing, saved: SavedRun | None) -> None:
    """Draws the pictures, or the batch of the only one that is wanted, and writes them with their grids."""
    batch_size = arguments.batch_size or drawing.drawer.sample_batch_size or BATCH_SIZE
    batches = batches_of(len(drawing.requests), batch_size, arguments.only)
    pictures, frames = sample(drawing, batches, arguments.seed, arguments.gif)
    settings = settings_of(["sample", *arguments.words], drawing.files, drawing.drawer.device)
    settings |= {"pinned": {"path": drawing.source}, "seed": arguments.seed, "weights": arguments.weights}
    settings["options" if saved is None else saved.task] = drawing.options
    write(folder, pictures, [number for batch in batches for number in batch], drawing, settings)
    if arguments.lora_scales is not None and arguments.only is None:
        grid = labelled_grid(pictures, row_names(drawing.requests, arguments.seed))
        save(as_pil(grid), folder, "lora_scales.png", settings, None)
    if frames is not None:
        write_gif(frames, drawing.drawer.grid_columns, folder / "denoising.gif")
        write_settings(folder / "denoising.json", settings)


@command
def main() -> None:
    arguments = parse(sys.argv[1:])
    print(run(arguments) if arguments.again is None else f"the same pixels: {again(arguments.again)}")


if __name__ == "__main__":
    main()
