"""Redraws pictures in the style of a LoRA: scripts/style_transfer.py BASE PICTURE ... --controlnet FOLDER --prompt TEXT

BASE is a folder or hub name of Stable Diffusion or SDXL, PICTURE a file or a folder of pictures. Image-to-image starts
from each picture, and a ControlNet for Canny edges keeps the outlines. The aspect ratio stays, up to the pixels per
latent. Each PNG holds its settings, and `scripts/sample.py --again FILE.png` redraws it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from datasets_lib.errors import InputError, MissingFileError
from datasets_lib.images.decode import read_picture
from datasets_lib.images.formats import EXTENSIONS, is_picture
from trainers.common.lora.tensors import lora_files
from trainers.engine.run.randomness import SlotRandom
from trainers.inference.canny import canny
from trainers.inference.command import command, path_argument, positive, seed
from trainers.inference.infotext import Infotext, clip_skip_of, named_loras, sampler_name
from trainers.inference.lora_pipeline import (
    add_loras,
    check_finite,
    check_negative_prompt,
    check_strength,
    load_pipeline,
    parse_loras,
)
from trainers.inference.picture_files import as_pil, output_folder, save_picture, settings_of
from trainers.inference.prompted_drawing import SAMPLERS, named_sampler
from trainers.inference.saved_run import find_device
from trainers.inference.text_embedding import prompt_arguments, settings_of_loras
from trainers.model_configs import check_files
from trainers.pretrained import read_model

# arguments that determine the pictures, apart from the base and the ControlNet
OPTIONS = (
    "prompt", "negative_prompt", "lora", "strength", "guidance", "control_scale", "sampler", "steps", "max_side",
    "seed",
)  # fmt: skip


def pictures_of(paths: list[str]) -> list[Path]:
    """Lists files, and those in folders by name; FileNotFoundError for a path without pictures."""
    found = []
    for path in map(Path, paths):
        inside = sorted(file for file in path.glob("*") if is_picture(file.name))
        if not path.is_file() and not inside:
            raise MissingFileError(f"{path}: is no picture, and no folder with any ({', '.join(EXTENSIONS)})")
        found += inside or [path]
    return found


def fitted(image: Image.Image, multiple: int, max_side: int) -> Image.Image:
    """Shrinks a picture to at most `max_side`, with sides that are multiples: crops the rest, distorts nothing."""
    scale = min(1.0, max_side / max(image.size))
    if min(image.size) * scale < multiple / 2:
        size = f"{image.width} x {image.height} pixels"
        raise InputError(f"--max-side {max_side}: leaves too little of a picture of {size}; raise it")
    sides = [max(1, min(round(side * scale / multiple), max_side // multiple)) * multiple for side in image.size]
    return ImageOps.fit(image, (sides[0], sides[1]), Image.Resampling.LANCZOS)


def edges_of(image: Image.Image) -> Image.Image:
    """Draws edges white on black, RGB, as ControlNets for Canny edges expect them."""
    return Image.fromarray(canny(np.asarray(image.convert("L")))).convert("RGB")


def read_controlnet(name: str) -> Any:
    """Loads a ControlNet; ValueError for a folder or hub name that holds none, or cannot be read."""
    from diffusers import ControlNetModel

    try:
        check_files(Path(name))
        kind = ControlNetModel.load_config(name).get("_class_name")
        if kind != "ControlNetModel":
            raise InputError(f"it is a {kind}")
        return read_model(ControlNetModel, name)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--controlnet {name}: cannot be read as a ControlNet ({reason})") from None


def build(arguments: argparse.Namespace, loras: list[tuple[Path, float]]) -> Any:
    """Builds the pipeline with ControlNet and LoRAs on its device; ValueError if they do not fit each other."""
    from diffusers import AutoPipelineForImage2Image

    device = find_device(arguments.device)
    controlnet, base = read_controlnet(arguments.controlnet), load_pipeline(arguments.base)
    if base.unet.config.in_channels != base.vae.config.latent_channels:
        raise InputError(f"{arguments.base}: is a base for inpainting; give an ordinary one")
    for name in ("cross_attention_dim", "block_out_channels"):
        own, wanted = controlnet.config[name], base.unet.config[name]
        if own != wanted:
            found = f"has {name} = {own}, BASE {wanted}; give one for the same family"
            raise InputError(f"--controlnet {arguments.controlnet}: {found}")
    pipeline = AutoPipelineForImage2Image.from_pipe(base, controlnet=controlnet)
    add_loras(pipeline, loras)
    if arguments.sampler is not None:
        pipeline.scheduler = named_sampler(arguments.sampler, pipeline.scheduler, [path for path, _ in loras])
    pipeline.set_progress_bar_config(desc="sampling", leave=False)
    return pipeline.to(device)


def restyle(
    pipeline: Any,
    asked: dict[str, Any],
    image: Image.Image,
    edges: Image.Image,
    number: int,
    arguments: argparse.Namespace,
) -> Image.Image:
    """Redraws a picture with the noise of its number; `asked` are the pipeline's arguments for the prompts."""
    drawn = pipeline(
        **asked,
        image=image,
        control_image=edges,
        height=image.height,
        width=image.width,
        strength=arguments.strength,
        guidance_scale=arguments.guidance,
        controlnet_conditioning_scale=arguments.control_scale,
        num_inference_steps=arguments.steps,
        generator=SlotRandom(arguments.seed, torch.tensor([number]), "sample").generators(),
        output_type="pt",
    )
    check_finite(drawn.images)
    return as_pil(drawn.images[0].float().cpu())


def infotext_of(
    pipeline: Any, arguments: argparse.Namespace, loras: list[tuple[Path, float]], clip_skip: int | None
) -> Infotext:
    return Infotext(
        model=arguments.base,
        sampler=sampler_name(pipeline.scheduler),
        steps=arguments.steps,
        guidance=arguments.guidance,
        seed=arguments.seed,
        negative_prompt=arguments.negative_prompt,
        loras=named_loras(loras),
        clip_skip=clip_skip_of(pipeline, clip_skip),
        strength=arguments.strength,
    )


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="a folder, .safetensors file or hub name")
    parser.add_argument("pictures", nargs="+", help="files and folders")
    parser.add_argument("--controlnet", required=True, help="folder or hub name, for Canny edges")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--negative-prompt", help="text that guidance moves away from")
    parser.add_argument("--lora", action="append", default=[], metavar="FILE[:WEIGHT]", help="default weight: 1")
    parser.add_argument("--strength", type=float, default=0.8, help="in (0, 1]: how much of the picture is redrawn")
    parser.add_argument("--guidance", type=float, default=7.5, help="guidance scale; 1: no guidance")
    parser.add_argument("--control-scale", type=float, default=0.8, help="strength of the edges; 0: no effect")
    parser.add_argument("--steps", type=positive, default=30, help="sampling steps, of which --strength takes a part")
    parser.add_argument("--sampler", choices=SAMPLERS, help="default: the base's own")
    parser.add_argument("--max-side", type=positive, default=768, help="pixels; larger pictures are shrunk")
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--save-edges", action="store_true", help="into the folder edges")
    parser.add_argument("--output-dir", type=path_argument, default=Path("outputs/style_transfer"))
    parser.add_argument("--device", help="default: cuda if available")
    parser.set_defaults(words=words, only=None, names=None)
    return parser.parse_intermixed_args(words)


def run(arguments: argparse.Namespace) -> str:
    """Redraws and writes the pictures; returns a line that says so. ValueError for settings that do not fit."""
    check_strength(arguments.strength, arguments.steps)
    check_negative_prompt(arguments.negative_prompt, arguments.guidance)
    for name in ("guidance", "control_scale"):
        if not 0 <= (value := getattr(arguments, name)) < float("inf"):
            raise InputError(f"--{name.replace('_', '-')} {value:g}: must be at least 0")
    loras, files = parse_loras(arguments.lora), pictures_of(arguments.pictures)
    names = [Path(name).name for name in arguments.names or names_of(files)]
    numbers = range(len(files)) if arguments.only is None else [arguments.only]
    read = [part for path, _ in loras for part in lora_files(path)]
    with output_folder(arguments.output_dir, [*files, *read]) as folder:
        for file in files:  # before a base is loaded
            read_picture(file)
        pipeline = build(arguments, loras)
        if arguments.max_side < pipeline.vae_scale_factor:
            raise InputError(f"--max-side {arguments.max_side}: must be at least {pipeline.vae_scale_factor}")
        texts, guided = settings_of_loras([path for path, _ in loras]), arguments.guidance > 1
        asked = prompt_arguments(pipeline, [arguments.prompt], arguments.negative_prompt, guided, texts)
        infotext = infotext_of(pipeline, arguments, loras, None if texts is None else texts.clip_skip)
        progress = tqdm(files, desc="pictures", disable=len(files) == 1)
        for number, file, name in zip(numbers, progress, names, strict=True):
            image = fitted(read_picture(file), pipeline.vae_scale_factor, arguments.max_side)
            edges = edges_of(image)
            settings = settings_of(["style_transfer", *arguments.words], [file, *read], pipeline.device)
            settings |= {"pinned": {"only": number, "pictures": [str(file)], "names": [name]}}
            settings |= {"size": list(image.size), "options": {name: getattr(arguments, name) for name in OPTIONS}}
            drawn, target = restyle(pipeline, asked, image, edges, number, arguments), f"{name}.png"
            text = infotext.of(arguments.prompt, drawn.size)
            save_picture(drawn, folder / target, settings | {"file": target}, text)
            if arguments.save_edges:
                save_picture(edges, folder / "edges" / target, settings | {"file": f"edges/{target}"})
    return f"{len(files)} pictures: {arguments.output_dir}"


def names_of(files: list[Path]) -> list[str]:
    """Names the files by their stems, with their numbers if some are the same."""
    names = [file.stem for file in files]
    return names if len(set(names)) == len(names) else [f"{n:05d}-{name}" for n, name in enumerate(names)]


@command
def main() -> None:
    print(run(parse(sys.argv[1:])))


if __name__ == "__main__":
    main()
