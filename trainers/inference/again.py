"""Redraws a picture from the settings in its file: scripts/sample.py --again."""

from __future__ import annotations

import argparse
import importlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from datasets_lib.errors import InputError
from datasets_lib.foreign import shown
from trainers.engine.config.files import ConfigError
from trainers.engine.config.overrides import parse_overrides
from trainers.inference.picture_files import PARAMETERS, check_files, is_ours, read_settings, save_picture

NOTHING = type(None)
TEXTS = (list, str)
NUMBERS = (list, int | float)
# each has parse(words) and run(arguments), which draws into arguments.output_dir; a picture's settings hold the words,
# and as "pinned" the arguments that they leave open, such as the checkpoint, or the number of the one picture to draw
SCRIPTS: dict[str, dict[str, Any]] = {
    "sample": {"path": str, "only": int | NOTHING},
    "style_transfer": {"pictures": TEXTS, "names": TEXTS, "only": int | NOTHING},
    "morph": {
        "lora_a": str, "lora_b": str, "weights": NUMBERS, "seed": NOTHING, "config": NOTHING,
        "overrides": (list, NOTHING),
    },
}  # fmt: skip
KINDS = {
    "command": TEXTS, "file": str, "files": dict, "pinned": dict, "threads": int, "device": str, "versions": dict,
}  # fmt: skip
MOST = {"number": 100_000, "steps": 10_000, "batch_size": 4096, "frames": 10_000, "max_side": 16_384}  # of arguments
MOST_THREADS = 1024
# options of a task whose values may be texts; others take numbers and null here, as texts could name code or files
MAY_BE_TEXT = {"sampler", "valid_classes", "validation_prompts", "negative_prompt", "classifier"}
KERNEL = ("/proc", "/sys", "/dev")  # whose files may have no end


def again(picture: Path) -> Path:
    """Redraws a picture into a file next to it, and returns that; ValueError if sources or pixels differ.

    The settings come from the picture's file, and so perhaps from somebody else: no code that they name is imported,
    and nothing is replaced but what was redrawn before.
    """
    settings = read_settings(picture)
    script, words, file = _checked(picture, settings)
    path = picture.with_stem(f"{picture.stem}-again")
    for existing in (path, path.with_suffix(".json")):
        if (existing.exists() or existing.is_symlink()) and not is_ours(path):
            raise InputError(f"{shown(existing)}: exists, and was not drawn by --again; move it away")
    module = importlib.import_module(f"scripts.{script}")
    arguments = _parsed(picture, module, words, settings["pinned"])  # before a file that it names is read
    check_files(picture, settings)
    torch.set_num_threads(settings["threads"])  # the order of sums depends on it
    with tempfile.TemporaryDirectory() as folder:
        arguments.output_dir = Path(folder)
        module.run(arguments)
        made = Image.open(Path(folder) / file, formats=["PNG"])
        save_picture(made, path, read_settings(Path(folder) / file), made.info.get(PARAMETERS))
    with Image.open(picture, formats=["PNG"]) as image:
        before, now = np.asarray(image), np.asarray(made)
    origin = f"it was made on {shown(settings['device'])} with torch {shown(settings['versions'].get('torch'))}"
    if before.shape != now.shape:
        raise InputError(f"{path}: has another size than {picture}; {origin}")
    if difference := np.abs(before.astype(int) - now.astype(int)).max():
        raise InputError(f"{path}: differs from {picture} by up to {difference} of 255; {origin}")
    return path


def _checked(picture: Path, settings: dict[str, Any]) -> tuple[str, list[str], Path]:
    """Returns script, words and file; ValueError for settings that none of the scripts wrote."""
    if not _fits(settings):
        scripts = ", ".join(SCRIPTS)
        raise InputError(f"{picture}: has other settings than those of this version's {scripts}; it cannot be repeated")
    script, *words = settings["command"]
    return script, words, Path(settings["file"])


def _fits(settings: dict[str, Any]) -> bool:
    """Whether all settings have the right type, and the file lies in the script's folder."""
    if not all(_is(settings.get(name), kind) for name, kind in KINDS.items()) or not settings["command"]:
        return False
    file, pinned = Path(settings["file"]), settings["pinned"]
    known = SCRIPTS.get(settings["command"][0], {})
    fits = (
        bool(known) and pinned.keys() == known.keys() and all(_is(pinned[name], kind) for name, kind in known.items())
    )
    plain = all(isinstance(name, str) and Path(name).name == name for name in pinned.get("names", []))
    files = all(isinstance(digest, str) for digest in settings["files"].values())
    files = files and not any(str(Path(name).resolve()).startswith(KERNEL) for name in settings["files"])
    inside = not file.is_absolute() and ".." not in file.parts
    return fits and plain and files and inside and 0 < settings["threads"] <= MOST_THREADS


def _is(value: Any, kind: Any) -> bool:
    if isinstance(kind, tuple):  # a list, and the type of its items
        return isinstance(value, list) and all(_is(item, kind[1]) for item in value)
    return isinstance(value, kind) and not isinstance(value, bool)


def _parsed(picture: Path, module: Any, words: list[str], pinned: dict[str, Any]) -> argparse.Namespace:
    """Parses the words of a command; ValueError for an argument that a picture from elsewhere must not choose."""
    try:
        arguments = module.parse(words)
        vars(arguments).update(pinned)
        refused = list(_refused(arguments))
    except (SystemExit, ConfigError) as error:  # argparse has said why
        raise InputError(
            f"{picture}: its command cannot be read ({shown(error)}); draw it by its own command"
        ) from None
    if refused:
        raise InputError(f"{picture}: its command sets {', '.join(refused)}, which --again does not; draw it yourself")
    return arguments


def _refused(arguments: argparse.Namespace) -> Iterator[str]:
    """Yields what is not on the list of harmless words, after they were parsed as the script parses them."""
    for name in ("trust_code", "again", "config"):
        if getattr(arguments, name, None):
            yield f"--{name.replace('_', '-')}"
    for name, most in MOST.items():
        if (value := getattr(arguments, name, None)) is not None and not _at_most(value, most):
            yield f"--{name.replace('_', '-')} {shown(value)} (at most {most:,})"
    given, problems = parse_overrides(arguments.overrides if hasattr(arguments, "overrides") else [])
    yield from map(shown, problems)
    for section, values in given.items():
        for name, value in values.items() if isinstance(values, dict) else [("", values)]:
            items = value if isinstance(value, list) else [value]
            may_be_text = section != "base" and name in MAY_BE_TEXT
            harmless = (NOTHING, int, float, str) if may_be_text else (NOTHING, int, float)
            if not all(isinstance(item, harmless) for item in items):
                yield f"{shown(section)}.{shown(name)}"


def _at_most(value: int | str, most: int) -> bool:
    try:
        return float(value) <= most  # not for NaN
    except (ValueError, OverflowError):
        return False
