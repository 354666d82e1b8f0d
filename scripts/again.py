"""A picture once more, from the settings that it carries: what scripts/sample.py --again does."""

from __future__ import annotations

import importlib
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from trainers.engine.picture_files import check_files, read_settings, save_picture

# each has parse(words) and run(arguments), which draws into arguments.output_dir; a picture's settings say which words,
# and what of the arguments they left open is "pinned": a checkpoint, or the number of the only picture that is wanted
SCRIPTS = ("sample", "style_transfer", "morph")


def again(picture: Path) -> Path:
    """Draws it as it was drawn, into a file beside it, and returns that.

    Raises FileNotFoundError and ValueError where what it was made from is not there, and where the pixels differ.
    """
    settings = read_settings(picture)
    script, *words = settings["command"]
    if script not in SCRIPTS:
        raise ValueError(f"{picture}: was made by {script}; known are {', '.join(SCRIPTS)}")
    check_files(picture, settings)
    torch.set_num_threads(settings["threads"])  # another number sums in another order
    module = importlib.import_module(f"scripts.{script}")
    with tempfile.TemporaryDirectory() as folder:
        arguments = module.parse(words)
        vars(arguments).update(settings["pinned"], output_dir=Path(folder))
        module.run(arguments)
        made, path = Image.open(Path(folder) / settings["file"]), picture.with_stem(f"{picture.stem}-again")
        save_picture(made, path, read_settings(Path(folder) / settings["file"]))
    with Image.open(picture) as before:
        _compare(picture, path, np.asarray(before), np.asarray(made), settings)
    return path


def _compare(picture: Path, path: Path, before: np.ndarray, now: np.ndarray, settings: dict[str, Any]) -> None:
    if before.shape == now.shape and (before == now).all():
        return
    made = f"it was made on {settings['device']} with torch {settings['versions']['torch']}"
    if before.shape != now.shape:
        raise ValueError(f"{path}: has another size than {picture}; {made}")
    difference = np.abs(before.astype(int) - now.astype(int)).max()
    raise ValueError(f"{path}: differs from {picture} by up to {difference} of 255; {made}")
