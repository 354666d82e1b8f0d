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
SCRIPTS = {
    "sample": {"path", "only"},
    "style_transfer": {"pictures", "names", "only"},
    "morph": {"lora_a", "lora_b", "weights", "seed", "config", "overrides"},
}
IMPORTS = ("base.trainer_class=", "base.dataset=")  # which name code: a picture from elsewhere must not choose any


def again(picture: Path) -> Path:
    """Draws it as it was drawn, into a file beside it, and returns that.

    Raises FileNotFoundError and ValueError where what it was made from is not there, and where the pixels differ.
    """
    settings = read_settings(picture)
    script, words, file = _checked(picture, settings)
    check_files(picture, settings)
    torch.set_num_threads(settings["threads"])  # another number sums in another order
    module = importlib.import_module(f"scripts.{script}")
    with tempfile.TemporaryDirectory() as folder:
        arguments = module.parse(words)
        vars(arguments).update(settings["pinned"], output_dir=Path(folder))
        module.run(arguments)
        made, path = Image.open(Path(folder) / file), picture.with_stem(f"{picture.stem}-again")
        save_picture(made, path, read_settings(Path(folder) / file))
    with Image.open(picture) as before:
        _compare(picture, path, np.asarray(before), np.asarray(made), settings)
    return path


def _checked(picture: Path, settings: dict[str, Any]) -> tuple[str, list[str], Path]:
    """Script, words and file; ValueError for settings that none of the scripts wrote."""
    try:
        script, *words = map(str, settings["command"])
        file, pinned = Path(settings["file"]), settings["pinned"]
        named = [str(word) for word in [*words, *pinned.get("overrides", [])]]
        known = pinned.keys() == SCRIPTS[script] and {*settings["files"], settings["device"], *settings["versions"]}
        fits = known and settings["threads"] > 0 and not file.is_absolute() and ".." not in file.parts
    except (KeyError, TypeError, ValueError, AttributeError):
        fits = False
    if not fits:
        scripts = ", ".join(SCRIPTS)
        raise ValueError(f"{picture}: has other settings than those of this version's {scripts}; it cannot be repeated")
    if any(word.startswith(IMPORTS) for word in named):
        raise ValueError(f"{picture}: its settings name code ({', '.join(IMPORTS)}); draw it by its own command")
    return script, words, file


def _compare(picture: Path, path: Path, before: np.ndarray, now: np.ndarray, settings: dict[str, Any]) -> None:
    if before.shape == now.shape and (before == now).all():
        return
    made = f"it was made on {settings['device']} with torch {settings['versions']['torch']}"
    if before.shape != now.shape:
        raise ValueError(f"{path}: has another size than {picture}; {made}")
    difference = np.abs(before.astype(int) - now.astype(int)).max()
    raise ValueError(f"{path}: differs from {picture} by up to {difference} of 255; {made}")
