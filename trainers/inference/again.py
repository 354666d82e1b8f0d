"""Redraws a picture from the settings in its file: scripts/sample.py --again."""

from __future__ import annotations

import importlib
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from trainers.inference.picture_files import check_files, read_settings, save_picture

# each has parse(words) and run(arguments), which draws into arguments.output_dir; a picture's settings hold the words,
# and as "pinned" the arguments that they leave open, such as the checkpoint, or the number of the one picture to draw
SCRIPTS = {
    "sample": {"path", "only"},
    "style_transfer": {"pictures", "names", "only"},
    "morph": {"lora_a", "lora_b", "weights", "seed", "config", "overrides"},
}
KINDS = {
    "command": list, "file": str, "files": dict, "pinned": dict, "threads": int, "device": str, "versions": dict,
}  # fmt: skip
IMPORTS = ("base.trainer_class=", "base.dataset=")  # these name code, which a picture from elsewhere must not choose


def again(picture: Path) -> Path:
    """Redraws a picture into a file next to it, and returns that; ValueError if sources or pixels differ."""
    settings = read_settings(picture)
    script, words, file = _checked(picture, settings)
    check_files(picture, settings)
    torch.set_num_threads(settings["threads"])  # the order of sums depends on it
    module = importlib.import_module(f"scripts.{script}")
    with tempfile.TemporaryDirectory() as folder:
        arguments = module.parse(words)
        vars(arguments).update(settings["pinned"], output_dir=Path(folder))
        module.run(arguments)
        made, path = Image.open(Path(folder) / file), picture.with_stem(f"{picture.stem}-again")
        save_picture(made, path, read_settings(Path(folder) / file))
    with Image.open(picture) as image:
        before, now = np.asarray(image), np.asarray(made)
    origin = f"it was made on {settings['device']} with torch {settings['versions'].get('torch')}"
    if before.shape != now.shape:
        raise ValueError(f"{path}: has another size than {picture}; {origin}")
    if difference := np.abs(before.astype(int) - now.astype(int)).max():
        raise ValueError(f"{path}: differs from {picture} by up to {difference} of 255; {origin}")
    return path


def _checked(picture: Path, settings: dict[str, Any]) -> tuple[str, list[str], Path]:
    """Returns script, words and file; ValueError for settings that none of the scripts wrote."""
    if not _fits(settings):
        scripts = ", ".join(SCRIPTS)
        raise ValueError(f"{picture}: has other settings than those of this version's {scripts}; it cannot be repeated")
    script, *words = map(str, settings["command"])
    named = [*words, *map(str, settings["pinned"].get("overrides", []))]
    if any(word.startswith(IMPORTS) for word in named):
        raise ValueError(f"{picture}: its settings name code ({', '.join(IMPORTS)}); draw it by its own command")
    return script, words, Path(settings["file"])


def _fits(settings: dict[str, Any]) -> bool:
    """Whether all settings have the right type, and the file lies in the script's folder."""
    if not all(isinstance(settings.get(name), kind) for name, kind in KINDS.items()) or not settings["command"]:
        return False
    script, file, pinned = str(settings["command"][0]), Path(settings["file"]), settings["pinned"]
    known = script in SCRIPTS and pinned.keys() == SCRIPTS[script] and isinstance(pinned.get("overrides", []), list)
    return known and settings["threads"] > 0 and not file.is_absolute() and ".." not in file.parts
