"""Draws pictures from a run or a checkpoint of any task: scripts/sample.py RUN [section.key=value ...]

Writes a grid, every picture in a folder per class, and settings.json. Same seed, same pictures, whatever the batch
size. Overrides set any option of the run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

import datasets_lib
from trainers.base import Trainer
from trainers.engine.drawing import draw, evaluation_mode
from trainers.engine.grids import grid_of
from trainers.engine.picture_metrics import spread
from trainers.engine.sampling_arguments import add_sampling_arguments, positive, trainer_of

SETTINGS = "settings.json"
GIF_FRAMES = 40  # at most, of the steps of the sampler
GIF_SECONDS = 2.0  # for the last frame


def sample(
    trainer: Trainer, requests: list[dict], held_out: Any, seed: int, batch_size: int, gif: bool
) -> tuple[dict, Tensor | None]:
    """Pictures [N, C, H, W] by name, and with `gif` those after steps of the sampler, [frames, N, C, H, W]."""
    batches: dict[str, list[Tensor]] = {}
    frames: list[Tensor] = []
    starts = range(0, len(requests), batch_size)
    with evaluation_mode(trainer, lambda steps: tqdm(steps, desc="sampling", leave=False)):
        for start in tqdm(starts, desc="batches", disable=len(starts) == 1):
            trainer.frames = [] if gif else None
            numbers = list(range(start, min(start + batch_size, len(requests))))
            for name, images in draw(trainer, requests, numbers, seed, batch_size, held_out).items():
                batches.setdefault(name, []).extend(images)
            if trainer.frames:
                frames.append(torch.stack([trainer.frames[n] for n in spread(len(trainer.frames), GIF_FRAMES)]))
    if gif and not frames:
        raise ValueError("--gif: this task's sampler shows no steps")
    return {name: torch.cat(images) for name, images in batches.items()}, torch.cat(frames, 1) if frames else None


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


def prepare_folder(folder: Path) -> None:
    """Makes the folder, without the pictures of an earlier call; ValueError where something else is in it."""
    if folder.exists() and any(folder.iterdir()):
        if not (folder / SETTINGS).is_file():
            raise ValueError(f"--output-dir {folder}: holds other files; choose a new folder")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)


def write(
    folder: Path, pictures: dict[str, Tensor], requests: list[dict], names: list[str] | None, columns: int | None
) -> None:
    """<name>.png is the grid, <name>/00000.png or <name>/<class>/00000.png are the pictures."""
    texts = [request["prompt"] for request in requests] if "prompt" in requests[0] else None
    for name, images in pictures.items():
        as_pil(grid_of([images], columns, texts)).save(folder / f"{name}.png")
        for number, (image, request) in enumerate(zip(images, requests, strict=True)):
            label = request.get("label")
            class_name = "" if label is None else str(names[label] if names else label)
            path = folder / name / re.sub(r"[^\w. -]|^\.", "_", class_name) / f"{number:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            as_pil(image).save(path)


def as_pil(image: Tensor) -> Image.Image:
    """Rounded, where torchvision would cut off."""
    return to_pil_image((image * 255).round().to(torch.uint8))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="folder of a run, or of one of its checkpoints")
    parser.add_argument("--number", type=positive, help="pictures; default: as many as at a validation")
    add_sampling_arguments(parser)
    parser.add_argument("--gif", action="store_true", help="animate the denoising")
    parser.add_argument("--output-dir", type=Path, help="default: RUN/samples/seed-SEED")
    return parser.parse_intermixed_args()


def main() -> None:
    arguments = parse()
    try:
        saved, trainer = trainer_of(arguments)
        trainer.config.valid_batch_size = arguments.number or trainer.config.valid_batch_size
        folder = arguments.output_dir or saved.folder / "samples" / f"seed-{arguments.seed}"
        prepare_folder(folder)
        held_out = held_out_set(trainer)
        requests = trainer.sample_requests(held_out)[: arguments.number]
        if not requests:
            raise ValueError(f"task {saved.task} draws no pictures")
        pictures, frames = sample(trainer, requests, held_out, arguments.seed, arguments.batch_size, arguments.gif)
        write(folder, pictures, requests, saved.label_names, trainer.grid_columns)
        if frames is not None:
            write_gif(frames, trainer.grid_columns, folder / "denoising.gif")
        source = str(saved.checkpoint or saved.folder)
        settings = {"from": source, "weights": arguments.weights, "seed": arguments.seed}
        settings |= {saved.task: dataclasses.asdict(trainer.config)}
        (folder / SETTINGS).write_text(json.dumps(settings, indent=1), encoding="utf-8")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{len(requests)} pictures of {source}: {folder}")


if __name__ == "__main__":
    main()
