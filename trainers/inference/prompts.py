"""Drawing prompts in scripts/sample.py: with runs of Stable Diffusion's tasks, and with any such pipeline."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from datasets_lib.images.decode import read_picture
from trainers.base import Fraction, NonNegativeFloat, Positive, Section, Trainer
from trainers.common.lora.files import ADAPTER, find_lora
from trainers.common.text_to_image.prompt_requests import prompt_requests
from trainers.common.text_to_image.stable_diffusion import StableDiffusionTrainer
from trainers.inference.arguments import overrides_of, pipeline_options
from trainers.inference.command import positive
from trainers.inference.lora_pipeline import add_loras, load_pipeline, parse_lora
from trainers.inference.prompted_drawing import (
    Inpainting,
    PromptedPipeline,
    PromptSettings,
    Sampler,
    for_pipelines,
    use_sampler,
)
from trainers.inference.saved_run import SavedRun, find_device, load_trainer

ARGUMENTS = (
    "prompt", "prompts", "negative_prompt", "lora", "lora_scales", "clip_skip", "image", "mask", "strength",
)  # fmt: skip


def add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Stable Diffusion", "runs of such tasks, and pipelines")
    group.add_argument("--prompt", action="append", metavar="TEXT", help="what to draw; can be repeated")
    group.add_argument("--prompts", metavar="FILE", help="a file of prompts, one per line")
    group.add_argument("--negative-prompt", metavar="TEXT", help="text that guidance moves away from")
    group.add_argument("--lora", action="append", metavar="FILE[:WEIGHT]", help="weight 1 if not given; repeatable")
    group.add_argument(
        "--lora-scales", metavar="A,B,...", help="draw a column for each, with the LoRAs' weights times it"
    )
    group.add_argument(
        "--clip-skip", type=positive, metavar="LAYERS", help="last layers of the text encoders to leave out"
    )
    group.add_argument("--image", metavar="FILE", help="picture to inpaint, in its own size")
    group.add_argument("--mask", metavar="FILE", help="white where the image is drawn anew; same size")
    group.add_argument("--strength", type=float, help="of inpainting, in (0, 1]; default 1: from pure noise")


def refuse_prompts(arguments: argparse.Namespace, task: str) -> None:
    """Raises ValueError for an option of Stable Diffusion that is given with another task."""
    for name in ARGUMENTS:
        if getattr(arguments, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')}: task {task} draws no prompts")


def prompts_of(arguments: argparse.Namespace) -> list[str] | None:
    """Reads the prompts of the command line and the file; None without any.

    Raises FileNotFoundError for a missing file, ValueError for one without prompts or not in UTF-8.
    """
    if arguments.prompts is None:
        return arguments.prompt
    path = Path(arguments.prompts)
    if not path.is_file():
        raise FileNotFoundError(f"--prompts {path}: there is no such file")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts {path}: is no text in UTF-8 ({error})") from None
    if not lines:
        raise ValueError(f"--prompts {path}: holds no prompt; write one a line")
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
        raise ValueError(f"--lora-scales {arguments.lora_scales}: must be different numbers, such as 0,0.5,1")
    return scales


@dataclasses.dataclass(kw_only=True)
class PipelineConfig(Section):
    """Options of the command line for a pipeline that is no run; what is not set is left to PromptSettings."""

    sampler: Sampler | None = None  # null: the pipeline's own
    num_inference_steps: Positive = 30  # steps of the sampler
    guidance_scale: NonNegativeFloat = 7.5  # 1: none
    guidance_rescale: Fraction = 0.0  # how far guided predictions get the conditional one's standard deviation


class Drawing(NamedTuple):
    """A drawer, its requests, and where the pictures go."""

    drawer: Trainer | PromptedPipeline
    requests: list[dict]
    source: str  # the run, checkpoint or pipeline
    folder: Path  # where pictures go, unless --output-dir says so
    options: dict[str, Any]  # to store in the pictures
    files: Sequence[Path] = ()  # small files that the pictures depend on
    names: list[str] | None = None  # of classes
    held_out: Any = None  # the data set whose examples the requests name


def is_pipeline(path: str) -> bool:
    """Whether a path is a pipeline but not a run: a folder without config.yaml, or a hub name."""
    folder = Path(path)
    if folder.is_dir():
        return (folder / "model_index.json").is_file() and not (folder / "config.yaml").is_file()
    return path.count("/") == 1 and path[0] not in "./~" and not folder.parent.exists()


class Loaded(NamedTuple):
    """A pipeline with the settings of its run."""

    pipeline: Any
    loras: dict[str, float]  # weights of its adapters by name
    settings: dict[str, Any]  # of PromptSettings
    prompts: list[str]
    source: str
    folder: Path


def of_prompts(arguments: argparse.Namespace, saved: SavedRun | None) -> Drawing:
    """Prepares drawing with the pipeline of a saved run, or else of `arguments.path`."""
    extra = [parse_lora(text) for text in arguments.lora or []]
    files = [find_lora(path) for path, _ in extra]
    inpainting = inpainting_of(arguments)
    asked = {"clip_skip": arguments.clip_skip, "lora_scales": scales_of(arguments)}
    asked |= {} if arguments.negative_prompt is None else {"negative_prompt": arguments.negative_prompt}
    load = _of_pipeline(arguments) if saved is None else _of_run(arguments, saved)
    added = add_loras(load.pipeline, extra)
    settings = PromptSettings(**load.settings | asked)
    load.pipeline.to(find_device(arguments.device))
    drawer = PromptedPipeline(load.pipeline, load.loras | added, settings, inpainting)
    requests = prompt_requests([{"prompt": prompt} for prompt in load.prompts], arguments.number or len(load.prompts))
    files += [Path(path) for path in (arguments.image, arguments.mask, arguments.prompts) if path is not None]
    options = dataclasses.asdict(settings) | {"lora_weights": list(drawer.loras.values())}
    return Drawing(drawer, requests, load.source, load.folder, options, files)


def _of_pipeline(arguments: argparse.Namespace) -> Loaded:
    prompts, source = prompts_of(arguments), arguments.path
    if prompts is None:
        raise ValueError(f"{source}: is a pipeline; say what to draw with --prompt or --prompts")
    settings = pipeline_options(arguments, PipelineConfig)
    sampler, pipeline = settings.pop("sampler", None), load_pipeline(source)
    if sampler is not None:
        use_sampler(pipeline, sampler, [parse_lora(text)[0] for text in arguments.lora or []])
    return Loaded(pipeline, {}, settings, prompts, source, Path("outputs", "samples", Path(source).name))


def _of_run(arguments: argparse.Namespace, saved: SavedRun) -> Loaded:
    trainer = load_trainer(saved, overrides_of(arguments, saved), arguments.weights, arguments.device)
    assert isinstance(trainer, StableDiffusionTrainer)  # scripts/sample.py asks for others' pictures elsewhere
    config, pipeline = trainer.config, trainer.pipeline()
    config.valid_batch_size = arguments.number or config.valid_batch_size
    prompts = prompts_of(arguments) or [request["prompt"] for request in trainer.sample_requests(None)]
    pipeline.scheduler = for_pipelines(trainer.chosen_sampler())
    settings = {f.name: getattr(config, f.name) for f in dataclasses.fields(PromptSettings) if hasattr(config, f.name)}
    settings["size"] = (trainer.base.resolution,) * 2
    loras = {ADAPTER: config.lora_scale} if hasattr(config, "lora_scale") else {}
    return Loaded(pipeline, loras, settings, prompts, str(saved.checkpoint or saved.folder), saved.folder / "samples")


def inpainting_of(arguments: argparse.Namespace) -> Inpainting | None:
    """Reads the picture and mask of the command line; ValueError if one of them is missing."""
    image, mask, strength = arguments.image, arguments.mask, arguments.strength
    if image is None and mask is None:
        if strength is not None:
            raise ValueError(f"--strength {strength:g}: has an effect with --image and --mask only")
        return None
    if image is None or mask is None:
        raise ValueError("--image and --mask: inpainting needs both, the picture and what of it is drawn anew")
    return Inpainting(
        read_picture(Path(image)), read_picture(Path(mask), "L", "black"), 1.0 if strength is None else strength
    )


def row_names(requests: list[dict], seed: int) -> list[str]:
    """Labels requests by their prompts, with seed and number if a prompt is drawn more than once."""
    prompts = [request["prompt"] for request in requests]
    names = [f"seed {seed}, number {number}" for number in range(len(prompts))]
    if len(set(prompts)) == 1:
        return names
    count = Counter(prompts)
    return [p if count[p] == 1 else f"{p} ({name})" for p, name in zip(prompts, names, strict=True)]
