"""Drawing from prompts in scripts/sample.py, with runs of Stable Diffusion's tasks and with any such pipeline."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from datasets_lib.errors import InputError, MissingFileError
from datasets_lib.images.decode import read_picture
from trainers.base import Trainer
from trainers.common.lora.files import ADAPTER
from trainers.common.lora.tensors import lora_files
from trainers.common.lora.training import AdapterTrainer
from trainers.common.text_to_image.prompt_requests import prompt_requests
from trainers.common.text_to_image.stable_diffusion import StableDiffusionTrainer
from trainers.inference.arguments import pipeline_options, trainer_of
from trainers.inference.command import not_negative
from trainers.inference.infotext import Infotext, clip_skip_of, lora_of_run, named_loras, sampler_name
from trainers.inference.lora_pipeline import add_loras, load_pipeline, parse_loras
from trainers.inference.prompted_drawing import (
    Inpainting,
    PromptedPipeline,
    PromptSettings,
    for_pipelines,
    named_sampler,
)
from trainers.inference.saved_run import SavedRun, find_device
from trainers.inference.text_embedding import settings_of_loras
from trainers.single_file.header import is_single_file

ARGUMENTS = (
    "prompt", "prompts", "negative_prompt", "lora", "lora_scales", "clip_skip", "image", "mask", "strength",
)  # fmt: skip


def add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Stable Diffusion", "for runs of its tasks, and pipelines")
    group.add_argument("--prompt", action="append", metavar="TEXT", help="what to draw; can be repeated")
    group.add_argument("--prompts", metavar="FILE", help="a file of prompts, one per line")
    group.add_argument("--negative-prompt", metavar="TEXT", help="text that guidance moves away from")
    group.add_argument("--lora", action="append", metavar="FILE[:WEIGHT]", help="default weight: 1; can be repeated")
    group.add_argument("--lora-scales", metavar="A,B,...", help="draw a column for each, scaling the LoRAs' weights")
    group.add_argument(
        "--clip-skip", type=not_negative, metavar="LAYERS", help="last text encoder layers to skip; 0: none"
    )
    group.add_argument("--image", metavar="FILE", help="picture to inpaint, at its own size")
    group.add_argument("--mask", metavar="FILE", help="white where the picture is redrawn; same size")
    group.add_argument("--strength", type=float, help="of inpainting, in (0, 1]; default: 1, from pure noise")


def refuse_prompts(arguments: argparse.Namespace, task: str) -> None:
    """Raises ValueError for an option of Stable Diffusion that is given with another task."""
    for name in ARGUMENTS:
        if getattr(arguments, name) is not None:
            raise InputError(f"--{name.replace('_', '-')}: task {task} draws no prompts")


def prompts_of(arguments: argparse.Namespace) -> list[str] | None:
    """Reads the prompts of the command line and the file, None without any; ValueError for an unsuitable file."""
    if arguments.prompts is None:
        return arguments.prompt
    path = Path(arguments.prompts)
    if not path.is_file():
        raise MissingFileError(f"--prompts {path}: there is no such file")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise InputError(f"--prompts {path}: is not text in UTF-8 ({error})") from None
    if not lines:
        raise InputError(f"--prompts {path}: holds no prompt; write one per line")
    return [*(arguments.prompt or []), *lines]


def scales_of(arguments: argparse.Namespace) -> list[float] | None:
    """Parses --lora-scales; ValueError unless the numbers are finite and different."""
    if arguments.lora_scales is None:
        return None
    try:
        scales = [float(text) for text in arguments.lora_scales.split(",")]
    except ValueError:
        scales = []
    if not scales or not all(map(math.isfinite, scales)) or len(set(scales)) < len(scales):
        raise InputError(f"--lora-scales {arguments.lora_scales}: must be different numbers, such as 0,0.5,1")
    return scales


class Drawing(NamedTuple):
    """A drawer and its requests, with what is written into the pictures."""

    drawer: Trainer | PromptedPipeline
    requests: list[dict]
    options: dict[str, Any]  # stored in the pictures
    files: Sequence[Path] = ()  # small files that the pictures depend on
    class_names: list[str] | None = None
    held_out: Any = None  # the data set whose examples the requests name
    infotext: Infotext | None = None  # of pictures of prompts
    scales: Mapping[str, float] = {}  # of the LoRAs' weights by column; 1 for others

    def infotext_of(self, requests: list[dict], column: str, size: tuple[int, int]) -> str | None:
        """Says for other programs how a picture was drawn; None without a prompt, or for a grid of several."""
        if self.infotext is None or len({request["prompt"] for request in requests}) > 1:
            return None
        return self.infotext.of(requests[0]["prompt"], size, self.scales.get(column, 1.0))


def is_pipeline(path: str) -> bool:
    """Whether a path is a pipeline but not a run: a folder without config.yaml, a single file, or a hub name."""
    if is_single_file(path):
        return True
    folder = Path(path)
    if folder.is_dir():
        return (folder / "model_index.json").is_file() and not (folder / "config.yaml").is_file()
    return path.count("/") == 1 and path[0] not in "./~" and not folder.parent.exists()


class Loaded(NamedTuple):
    """A pipeline with its LoRAs and settings, to draw pictures of prompts with."""

    pipeline: Any
    weights: dict[str, float]  # of its adapters by name
    settings: dict[str, Any]  # of PromptSettings
    prompts: list[str]
    plain: Any  # the sampler without adapters
    model: str  # folder, file or hub name of what draws, without adapters


def of_prompts(arguments: argparse.Namespace, saved: SavedRun | None) -> Drawing:
    """Prepares drawing with the pipeline of a saved run, or else of `arguments.path`."""
    loras, inpainting = parse_loras(arguments.lora), inpainting_of(arguments)
    asked: dict[str, Any] = {"lora_scales": scales_of(arguments)}
    asked |= {} if arguments.clip_skip is None else {"clip_skip": arguments.clip_skip or None}
    asked |= {} if arguments.negative_prompt is None else {"negative_prompt": arguments.negative_prompt}
    loaded = _of_pipeline(arguments, loras) if saved is None else _of_run(arguments, saved, loras)
    pipeline, weights, known, prompts, plain, _ = loaded
    settings = PromptSettings(**known | asked)
    drawer = PromptedPipeline(pipeline.to(find_device(arguments.device)), weights, settings, inpainting, plain)
    if not prompts:
        raise InputError(f"{arguments.path}: has no validation_prompts; say what to draw with --prompt or --prompts")
    requests = prompt_requests([{"prompt": prompt} for prompt in prompts], arguments.number or len(prompts))
    files = [file for path, _ in loras for file in lora_files(path)]
    files += [Path(path) for path in (arguments.image, arguments.mask, arguments.prompts) if path is not None]
    options = dataclasses.asdict(settings) | {"lora_weights": list(weights.values())}
    scales = {drawer.column(scale): scale for scale in settings.lora_scales or []}
    own = [lora_of_run(saved, arguments, weights[ADAPTER])] if saved is not None and ADAPTER in weights else []
    infotext = Infotext(
        model=loaded.model,
        sampler=sampler_name(pipeline.scheduler),
        plain_sampler=sampler_name(plain),
        steps=settings.num_inference_steps,
        guidance=settings.guidance_scale,
        seed=arguments.seed,
        negative_prompt=settings.negative_prompt,
        loras=(*own, *named_loras(loras)),
        clip_skip=clip_skip_of(pipeline, settings.clip_skip),
        strength=None if inpainting is None else inpainting.strength,
    )
    return Drawing(drawer, requests, options, files, infotext=infotext, scales=scales)


def _of_pipeline(arguments: argparse.Namespace, loras: list[tuple[Path, float]]) -> Loaded:
    prompts = prompts_of(arguments)
    if prompts is None:
        raise InputError(f"{arguments.path}: is a pipeline; say what to draw with --prompt or --prompts")
    settings, files = pipeline_options(arguments, PromptSettings), [path for path, _ in loras]
    if texts := settings_of_loras(files, arguments.clip_skip):
        settings |= texts._asdict()
    pipeline = load_pipeline(arguments.path)
    plain, weights = pipeline.scheduler, add_loras(pipeline, loras)  # which may change the scheduler
    if (name := settings.get("sampler")) is not None:
        plain = named_sampler(name, plain, files)
        pipeline.scheduler = named_sampler(name, pipeline.scheduler, files)
    return Loaded(pipeline, weights, settings, prompts, plain, arguments.path)


def _of_run(arguments: argparse.Namespace, saved: SavedRun, loras: list[tuple[Path, float]]) -> Loaded:
    trainer = trainer_of(arguments, saved)
    assert isinstance(trainer, StableDiffusionTrainer)  # scripts/sample.py draws other tasks itself
    config, pipeline = trainer.config, trainer.pipeline()
    config.valid_batch_size = arguments.number or config.valid_batch_size
    prompts = prompts_of(arguments) or [request["prompt"] for request in trainer.sample_requests(None)]
    own = trainer.chosen_sampler()
    plain = (trainer.base_sampler() if isinstance(trainer, AdapterTrainer) else None) or own
    weights = {ADAPTER: config.lora_scale} if hasattr(config, "lora_scale") else {}
    pipeline.scheduler, plain = for_pipelines(own if any(weights.values()) else plain), for_pipelines(plain)
    settings = {f.name: getattr(config, f.name) for f in dataclasses.fields(PromptSettings) if hasattr(config, f.name)}
    settings["size"] = (trainer.base.resolution,) * 2
    model = config.pretrained_model_name_or_path if weights else str(saved.folder)
    return Loaded(pipeline, weights | add_loras(pipeline, loras), settings, prompts, plain, str(model))


def inpainting_of(arguments: argparse.Namespace) -> Inpainting | None:
    """Reads the picture and mask of the command line; ValueError if only one of them is given."""
    image, mask, strength = arguments.image, arguments.mask, arguments.strength
    if image is None and mask is None:
        if strength is not None:
            raise InputError(f"--strength {strength:g}: has an effect with --image and --mask only")
        return None
    if image is None or mask is None:
        raise InputError("--image and --mask: inpainting needs both, the picture and the part of it to redraw")
    strength = 1.0 if strength is None else strength
    return Inpainting(read_picture(Path(image)), read_picture(Path(mask), "L", "black"), strength)


def row_names(requests: list[dict], seed: int) -> list[str]:
    """Labels requests by their prompts, with seed and number if a prompt is drawn more than once."""
    prompts = [request["prompt"] for request in requests]
    names = [f"seed {seed}, number {number}" for number in range(len(prompts))]
    if len(set(prompts)) == 1:
        return names
    return [p if prompts.count(p) == 1 else f"{p} ({name})" for p, name in zip(prompts, names, strict=True)]
