"""Turns one picture into another: scripts/morph.py BASE FIRST LAST [--prompt TEXT] [section.key=value ...]

BASE is a folder or hub name of Stable Diffusion or SDXL. Each picture has a LoRA that knows it alone: either given, or
trained here by --config (overrides change it) into a folder next to --output-dir, where the next call finds it. DDIM
inverts each picture with its own LoRA; frames are drawn from interpolations of the two noises, with both LoRAs. Mixed
are the LoRAs' differences, W + (1 - w) D_1 + w D_2, not the factors B and A of D = alpha / r B A. There is no guidance.
Self-attention and the noise's statistics are interpolated as in DiffMorpher (arXiv 2312.07409).

The first and the last frame are the pictures as DDIM reconstructs them: the contact sheet shows the originals next to
them, and psnr_of_ends in the settings says how close they are. Pictures are fitted into the model's square without
distortion; frames get their aspect ratio back, or one in between. --output-dir gets morph.gif, morph.mp4, morph.png
(the contact sheet) and frames; each PNG holds its settings, and `scripts/sample.py --again FILE.png` redraws it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from datasets_lib.errors import InputError
from datasets_lib.images.decode import read_picture
from trainers.common.autoencoder.options import perceptual_problem
from trainers.common.autoencoder.perceptual import load_perceptual
from trainers.common.lora.files import read_lora
from trainers.common.lora.tensors import lora_files
from trainers.common.text_to_image.base_model import BaseModel, base_model_problems
from trainers.inference.animation import centred, contact_sheet, write_gif, write_mp4
from trainers.inference.arguments import DTYPES
from trainers.inference.command import command, path_argument, positive, seed
from trainers.inference.fitting import Fitted, fit, size_between, unfit
from trainers.inference.infotext import Infotext, clip_skip_of, named_lora, sampler_name
from trainers.inference.inversion import ddim_schedulers
from trainers.inference.lora_pipeline import load_pipeline, print_notes
from trainers.inference.morphing import Morph, check_morph, evenly_distant
from trainers.inference.picture_files import as_pil, output_folder, save_picture, settings_of
from trainers.inference.saved_run import find_device
from trainers.inference.single_picture import single_picture_lora
from trainers.inference.text_embedding import settings_of_loras

SHEET_COLUMNS = 6


def side_of(base: BaseModel) -> int:
    """Returns the side of the squares that a base works on, in pixels."""
    files = [base.folder / part / "config.json" for part in ("unet", "vae")]
    unet, vae = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    return unet["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1)


def check(arguments: argparse.Namespace) -> BaseModel:
    """Returns the base; raises ValueError or FileNotFoundError, before any training, for arguments that do not fit."""
    if not 0 <= arguments.attention <= 1:
        raise InputError(f"--attention {arguments.attention}: must be a fraction of the steps, from 0 to 1")
    if arguments.attention and not round(arguments.attention * arguments.steps):
        raise InputError(f"--attention {arguments.attention}: is none of {arguments.steps} steps; raise it, or give 0")
    if arguments.frames < 3:
        raise InputError(f"--frames {arguments.frames}: leaves none between the two ends; give at least 3")
    given = [Path(lora) for lora in (arguments.lora_a, arguments.lora_b) if lora]
    if len(given) == 2 and not (arguments.seed is arguments.config is None and not arguments.overrides):
        raise InputError("--seed, --config and overrides are for training, and both LoRAs are given; leave them out")
    for problem in base_model_problems(arguments.base, ("unet", "vae", "text_encoder", "tokenizer")):
        raise InputError(f"BASE = {arguments.base}: {problem}")
    base = BaseModel("BASE", arguments.base)
    ddim_schedulers(base.sampler, arguments.steps)
    for lora in given:
        print_notes(read_lora(lora))
    if len(given) < 2:  # otherwise nothing is trained before Morph checks the same
        check_morph(load_pipeline(base.location, dtypes_of(arguments)), given, arguments.attention)
    return base


def dtypes_of(arguments: argparse.Namespace) -> dict[str, torch.dtype]:
    """Keeps the autoencoder in float32, because some overflow in half precision."""
    return {"default": DTYPES[arguments.dtype], "vae": torch.float32}


def perceptual(spec: str, side: int) -> nn.Module:
    """Loads the distance by which frames are spaced; ValueError if it cannot be loaded."""
    try:
        if problem := perceptual_problem(spec, 3, side):
            raise InputError(problem)
        return load_perceptual(spec, side)
    except ValueError as error:
        raise InputError(f"--reschedule {spec}: {error}") from None


def draw(
    pipeline: Any, pictures: list[Fitted], loras: list[Path], distance: nn.Module | None, arguments: argparse.Namespace
) -> tuple[list[float], Tensor]:
    """Returns the frames' weights from 0 to 1, and the frames as squares [N, 3, S, S] in [0, 1] on the CPU."""
    options = {name: getattr(arguments, name) for name in ("steps", "attention", "adain")}
    morph = Morph(pipeline, loras, prompts_of(arguments), **options)
    morph.invert(torch.stack([picture.pixels for picture in pictures]).to(pipeline.device))
    weights = arguments.weights or torch.linspace(0, 1, arguments.frames, dtype=torch.float64).tolist()
    frames = morph.frames(weights)
    if distance is not None:
        distances = [distance(*(2 * frames[n : n + 2, None] - 1)).item() for n in range(len(frames) - 1)]
        weights = evenly_distant(weights, distances)
        frames = morph.frames(weights)
    return weights, frames


def prompts_of(arguments: argparse.Namespace) -> list[str]:
    return [arguments.prompt, arguments.prompt if arguments.prompt_b is None else arguments.prompt_b]


def infotext_of(arguments: argparse.Namespace, pipeline: Any, loras: list[Path]) -> Infotext:
    texts = settings_of_loras(loras)
    return Infotext(
        model=arguments.base,
        sampler=sampler_name(ddim_schedulers(pipeline.scheduler, arguments.steps)[0]),
        steps=arguments.steps,
        guidance=1.0,
        seed=None,
        loras=tuple(named_lora(path, 1.0) for path in loras),
        clip_skip=clip_skip_of(pipeline, None if texts is None else texts.clip_skip),
    )


def text_of_frame(infotext: Infotext, prompts: list[str], weight: float, size: tuple[int, int]) -> str:
    """Says how a frame was drawn; of two prompts, whose embeddings are interpolated, it names the shares."""
    shares = [1 - weight, weight]
    acting = [(prompt, share) for prompt, share in zip(prompts, shares, strict=True) if share]
    alike = len({prompt for prompt, _ in acting}) == 1
    prompt = acting[0][0] if alike else " AND ".join(f"{prompt} :{share:g}" for prompt, share in acting)
    return infotext.of(prompt, size, shares)


def write(
    folder: Path, squares: Tensor, pictures: list[Fitted], settings: dict[str, Any], infotext: Infotext
) -> list[float]:
    """Writes frames in their own sizes; animations and the sheet, which has the pictures too, on white of one size.

    Returns the PSNR of the first and of the last frame to the pictures.
    """
    weights, names = settings["weights"], [Path(path).name for path in settings["pictures"]]
    sizes = [size_between(pictures[0].size, pictures[1].size, weight) for weight in weights]
    frames = [unfit(square, size) for square, size in zip(squares, sizes, strict=True)]
    given = [unfit(picture.pixels / 2 + 0.5, picture.size) for picture in pictures]
    errors = [(a - b).square().mean() for a, b in zip((frames[0], frames[-1]), given, strict=True)]
    psnr = [-10 * error.log10().item() for error in errors]
    settings = settings | {"psnr_of_ends": psnr}
    for number, (frame, weight) in enumerate(zip(frames, weights, strict=True)):
        file, picture = f"frames/{number:05d}.png", as_pil(frame)
        text = text_of_frame(infotext, settings["prompts"], weight, picture.size)
        save_picture(picture, folder / file, settings | {"file": file, "frame": number, "weight": weight}, text)
    sheet = centred([*map(as_pil, [given[0], *frames, given[1]])])
    write_gif(sheet[1:-1], folder / "morph.gif", json.dumps(settings))
    if not write_mp4(sheet[1:-1], folder / "morph.mp4", json.dumps(settings)):
        print("no morph.mp4: imageio with imageio-ffmpeg is not installed")
    texts = [names[0], *(f"{weight:.3g}" for weight in weights), names[1]]
    save_picture(contact_sheet(sheet, SHEET_COLUMNS, texts), folder / "morph.png", settings | {"file": "morph.png"})
    return psnr


def settings_for(
    arguments: argparse.Namespace, loras: list[Path], weights: list[float], device: torch.device
) -> dict[str, Any]:
    """Collects how the pictures are made; "pinned" are the LoRAs and weights, so that neither is computed again."""
    paths = [arguments.first, arguments.last]
    lora_a, lora_b = map(str, loras)
    pinned = {"lora_a": lora_a, "lora_b": lora_b, "weights": weights, "seed": None, "config": None, "overrides": []}
    options = {name: getattr(arguments, name) for name in ("steps", "attention", "adain", "reschedule", "dtype")}
    files = [file for lora in loras for file in lora_files(lora)]
    settings = settings_of(["morph", *arguments.words], [*paths, *files], device)
    settings |= {"pinned": pinned, "weights": weights, "options": options}
    return settings | {"pictures": [*map(str, paths)], "prompts": prompts_of(arguments)}


def run(arguments: argparse.Namespace) -> str:
    """Trains LoRAs that are not given, draws and writes the frames; returns a line that says so."""
    given, paths = [arguments.lora_a, arguments.lora_b], [arguments.first, arguments.last]
    with output_folder(arguments.output_dir, [path for path in [*paths, *given] if path]) as folder:
        base, device = check(arguments), find_device(arguments.device)
        side = side_of(base)
        pictures = [fit(read_picture(path), side) for path in paths]
        spaced = arguments.reschedule and not arguments.weights
        distance = perceptual(arguments.reschedule, side) if spaced else None
        loras = []
        for lora, picture, path, prompt in zip(given, pictures, paths, prompts_of(arguments), strict=True):
            loras.append(Path(lora or single_picture_lora(picture, path.stem, prompt, base, arguments)))
        pipeline = load_pipeline(base.location, dtypes_of(arguments)).to(device)
        weights, squares = draw(pipeline, pictures, loras, distance, arguments)
        settings = settings_for(arguments, loras, weights, device)
        psnr = write(folder, squares, pictures, settings, infotext_of(arguments, pipeline, loras))
    ends = f"first and last: {psnr[0]:.1f} and {psnr[1]:.1f} dB PSNR to the pictures"
    return f"{len(weights)} frames ({ends}): {arguments.output_dir}"


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="a folder, .safetensors file or hub name")
    parser.add_argument("first", type=path_argument, help="a picture")
    parser.add_argument("last", type=path_argument, help="another picture")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="options of the LoRAs' training")
    parser.add_argument("--prompt", default="", help="what the pictures show")
    parser.add_argument("--prompt-b", help="what the last one shows, if different; the embeddings are interpolated")
    parser.add_argument("--lora-a", metavar="FILE", help="LoRA of the first picture; default: trained here")
    parser.add_argument("--lora-b", metavar="FILE", help="LoRA of the last picture; default: trained here")
    parser.add_argument(
        "--config", type=path_argument, help="config of the training; default: configs/lora_single_image.yaml"
    )
    parser.add_argument("--frames", type=positive, default=16, help="including both ends; default: %(default)s")
    parser.add_argument("--steps", type=positive, default=50, help="of DDIM in each direction; default: %(default)s")
    attention = "fraction of the steps, from the first on, that interpolate self-attention; default: %(default)s"
    parser.add_argument("--attention", type=float, default=0.6, metavar="FRACTION", help=attention)
    adain = "interpolate the means and deviations of the noise's channels"
    parser.add_argument("--adain", action=argparse.BooleanOptionalAction, default=True, help=adain)
    distances = "ms_ssim, lpips, lpips:FILE or NETWORK:FILE: space frames evenly by this distance; takes twice as long"
    parser.add_argument("--reschedule", metavar="DISTANCE", help=distances)
    parser.add_argument("--seed", type=seed, help="of the LoRAs' training, the only random part; default: 0")
    parser.add_argument("--device", help="for drawing; default: cuda if available. Training uses accelerate's")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the networks, also in training")
    parser.add_argument("--output-dir", type=path_argument, default=Path("outputs/morph"), help="default: %(default)s")
    parser.set_defaults(words=words, weights=None)  # weights of the frames, when a picture is redrawn
    return parser.parse_intermixed_args(words)


@command
def main() -> None:
    print(run(parse(sys.argv[1:])))


if __name__ == "__main__":
    main()
