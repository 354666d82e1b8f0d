"""Single pictures of a validation's prompts, which the hub shows as a gallery: a grid would be one picture there."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, PngImagePlugin
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from trainers.engine.run.files import make_folder, new_file
from trainers.engine.run.run_folder import SAMPLES

MOST = 8  # pictures
PROMPT = "Description"  # the PNG standard's name for what a picture shows
MOST_CHARACTERS = 2000  # of a prompt that is read


class Shown(NamedTuple):
    """A picture, by its place in the run's folder, and its prompt."""

    place: str
    prompt: str


def write_gallery(output_dir: Path, requests: list[dict[str, Any]], images: Tensor) -> None:
    """Replaces samples/prompt-00.png and so on by pictures [N, C, H, W] in [0, 1] of requests, with their prompts."""
    folder = output_dir / SAMPLES
    make_folder(folder)
    for number in range(len(requests), MOST):  # of earlier prompts, which were more
        (folder / f"prompt-{number:02d}.png").unlink(missing_ok=True)
    for number, (request, image) in enumerate(zip(requests[:MOST], images, strict=False)):
        chunk = PngImagePlugin.PngInfo()
        chunk.add_itxt(PROMPT, request["prompt"].encode(errors="replace").decode())
        with new_file(folder / f"prompt-{number:02d}.png") as file:
            to_pil_image((image * 255).round().to(torch.uint8).cpu()).save(file, "PNG", pnginfo=chunk)


def read_gallery(output_dir: Path) -> list[Shown]:
    """Lists the pictures of the last validation, also of an earlier start of the run."""
    paths = [output_dir / SAMPLES / f"prompt-{number:02d}.png" for number in range(MOST)]
    found = [(path, _prompt(path)) for path in paths if path.is_file() and not path.is_symlink()]
    return [Shown(f"{SAMPLES}/{path.name}", prompt) for path, prompt in found if prompt is not None]


def _prompt(path: Path) -> str | None:
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return str(getattr(image, "text", {})[PROMPT])[:MOST_CHARACTERS]
    except (OSError, ValueError, KeyError, SyntaxError, Image.DecompressionBombError):  # not as it was written
        return None
