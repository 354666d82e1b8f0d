"""Draws pictures from a run or a checkpoint of any task: scripts/sample.py RUN [section.key=value ...]

Writes a grid, every picture, and settings.json. Same seed, same pictures, whatever the batch size. Overrides set any
option of the task, such as conditional_ddpm.classifier=outputs/classifier for classifier guidance.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from trainers.base import Trainer
from trainers.engine.config import RunConfig
from trainers.engine.drawing import draw, evaluation_mode
from trainers.engine.inference import load_trainer, open_run
from trainers.engine.schema import options as options_of
from trainers.engine.validation import grid_of

GIF_FRAMES = 40  # at most, of the steps of the sampler
GIF_SECONDS = 2.0  # for the last frame

# command line -> how the option is called in a task's section; an ending, as ddpm_num_inference_steps
OPTIONS = {
    "steps": "num_inference_steps",
    "sampler": "sampler",
    "guidance": "guidance_scale",
    "guidance_rescale": "guidance_rescale",
    "guidance_interval": "guidance_interval",
    "classes": "valid_classes",
    "classifier": "classifier",
    "classifier_scale": "classifier_scale",
    "number": "valid_batch_size",
}


def overrides_of(arguments: argparse.Namespace, run: RunConfig) -> list[str]:
    """The options of the command line as overrides; ValueError for one that the task does not have."""
    found = []
    for argument, option in OPTIONS.items():
        value = getattr(arguments, argument)
        if value is None:
            continue
        names = [name for name in options_of(type(run.config)) if name == option or name.endswith(f"_{option}")]
        if not names:
            raise ValueError(f"--{argument.replace('_', '-')} {value}: task {run.task} has no option {option}")
        if argument == "classes":
            value = json.dumps(value.split(","))  # names stay texts
        found.append(f"{run.task}.{names[0]}=" + (f"[{value}]" if argument == "guidance_interval" else str(value)))
    return found


def sample(trainer: Trainer, requests: list[dict], seed: int, batch_size: int, gif: bool) -> tuple[dict, Tensor | None]:
    """Pictures [N, C, H, W] by name, and with `gif` those after every step of the sampler, [steps, N, C, H, W]."""
    batches: dict[str, list[Tensor]] = {}
    frames: list[Tensor] = []
    starts = range(0, len(requests), batch_size)
    with evaluation_mode(trainer, lambda steps: tqdm(steps, desc="sampling", leave=False)):
        for start in tqdm(starts, desc="batches", disable=len(starts) == 1):
            trainer.frames = [] if gif else None
            numbers = list(range(start, min(start + batch_size, len(requests))))
            for name, images in draw(trainer, requests, numbers, seed, batch_size).items():
                batches.setdefault(name, []).extend(images)
            frames += [torch.stack(trainer.frames)] if trainer.frames else []
    if gif and not frames:
        raise ValueError("--gif: this task's sampler shows no steps")
    return {name: torch.cat(images) for name, images in batches.items()}, torch.cat(frames, 1) if frames else None


def write_gif(frames: Tensor, columns: int | None, path: Path) -> None:
    """An animation of grids, of [steps, N, C, H, W]; it holds the last one."""
    chosen = torch.linspace(0, len(frames) - 1, min(len(frames), GIF_FRAMES)).long()
    grids = [to_pil_image(grid_of([frames[step]], columns)) for step in chosen]
    durations = [60] * (len(grids) - 1) + [int(GIF_SECONDS * 1000)]
    grids[0].save(path, save_all=True, append_images=grids[1:], duration=durations, loop=0)


def write(folder: Path, pictures: dict[str, Tensor], requests: list[dict], columns: int | None) -> None:
    """<name>.png is the grid, <name>-00000.png are the pictures, with the label that was asked for in the name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, images in pictures.items():
        to_pil_image(grid_of([images], columns)).save(folder / f"{name}.png")
        for number, (image, request) in enumerate(zip(images, requests, strict=True)):
            label = f"-class-{request['label']}" if "label" in request else ""
            as_pil(image).save(folder / f"{name}-{number:05d}{label}.png")


def as_pil(image: Tensor) -> Image.Image:
    """Rounded, where torchvision would cut off."""
    return to_pil_image((image * 255).round().to(torch.uint8))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="folder of a run, or of one of its checkpoints")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--number", type=int, help="pictures; default: as many as at a validation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", help="of the sampler")
    parser.add_argument("--sampler", help="ddpm, ddim or dpmsolver++")
    parser.add_argument("--guidance", help="guidance scale; 1: none, 0: no class")
    parser.add_argument("--guidance-rescale", help="in [0, 1]")
    parser.add_argument("--guidance-interval", metavar="LOW,HIGH", help="of the noise level sigma")
    parser.add_argument("--classes", metavar="A,B,...", help="names or numbers; default: all")
    parser.add_argument("--classifier", metavar="RUN", help="a noisy_classifier run, for classifier guidance")
    parser.add_argument("--classifier-scale", help="how strongly it guides")
    parser.add_argument("--weights", choices=["ema", "raw"], help="default: averaged ones where there are any")
    parser.add_argument("--batch-size", type=int, default=64, help="pictures at once; changes none of them")
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--gif", action="store_true", help="animate the denoising")
    parser.add_argument("--output-dir", type=Path, help="default: RUN/samples/seed-SEED")
    return parser.parse_intermixed_args()


def main() -> None:
    arguments = parse()
    try:
        run = open_run(arguments.path, arguments.overrides).run
        saved = open_run(arguments.path, [*arguments.overrides, *overrides_of(arguments, run)])
        trainer = load_trainer(saved, arguments.weights, arguments.device)
        requests = trainer.sample_requests(None)[: arguments.number]
        if not requests:
            raise ValueError(f"task {run.task} draws no pictures")
        pictures, frames = sample(trainer, requests, arguments.seed, arguments.batch_size, arguments.gif)
        folder = arguments.output_dir or saved.folder / "samples" / f"seed-{arguments.seed}"
        write(folder, pictures, requests, trainer.grid_columns)
        if frames is not None:
            write_gif(frames, trainer.grid_columns, folder / "denoising.gif")
        source = str(saved.checkpoint or saved.folder)
        settings = {"from": source, "weights": arguments.weights, "seed": arguments.seed} | saved.run.as_dict()
        (folder / "settings.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{len(requests)} pictures of {source}: {folder}")


if __name__ == "__main__":
    main()
