"""kohya's file of prompts: a line each, with options such as `--n ugly --s 28` behind it."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

from datasets_lib.foreign import read_bytes
from trainers.inference.foreign_configs.readers import NoEqual
from trainers.inference.foreign_configs.translation import Translation

BYTES = 1 << 20
KEYS = {"n": "negative_prompt", "s": "sample_steps", "l": "scale"}
OURS = {
    "negative_prompt": ("task.negative_prompt", str), "sample_steps": ("task.num_inference_steps", int),
    "scale": ("task.guidance_scale", float),
}  # fmt: skip


def sample_prompts(made: Translation, place: Path) -> None:
    """Takes the texts over, and what all of them have in common."""
    if (name := made.given.get("sample_prompts")) is None:
        return
    file = next((path for path in (Path(str(name)), place / str(name)) if path.is_file()), None)
    try:
        prompts = _prompts(file) if file is not None else []
    except NoEqual as reason:
        made.leave("sample_prompts", str(reason))
        return
    if not prompts:
        made.leave("sample_prompts", "has no texts" if file else "there is no such file; write its texts here")
        return
    made.write("task.validation_prompts", [str(prompt["prompt"]) for prompt in prompts], "sample_prompts")
    made.write("task.valid_batch_size", len(prompts), remark="one of each, as there")
    for key, (here, kind) in OURS.items():
        found = {str(prompt.get(key)) for prompt in prompts}
        if len(found) == 1 and None not in [prompt.get(key) for prompt in prompts]:
            try:
                made.write(here, kind(prompts[0][key]), remark="of the prompts")
            except ValueError:
                made.notes.append(f"{key} of the prompts is no number")


def _prompts(file: Path) -> list[dict[str, Any]]:
    try:
        content = read_bytes(file, BYTES).decode()
        if file.suffix == ".toml":
            common = tomllib.loads(content)["prompt"]
            found = [common | subset for subset in common.get("subset", [])]
        elif file.suffix == ".json":
            found = [each if isinstance(each, dict) else _of_line(each) for each in json.loads(content)]
        else:
            lines = [line.strip() for line in content.splitlines() if line[:1] != "#"]
            found = [_of_line(line) for line in lines if line]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise NoEqual("cannot be read; write its texts here") from None
    return [each for each in found if "prompt" in each]


def _of_line(line: str) -> dict[str, Any]:
    text, *options = line.split(" --")
    found = {"prompt": text}
    for option in options:
        if (match := re.fullmatch(r"([nsl]) (.+)", option.strip())) is not None:
            found[KEYS[match[1]]] = match[2]
    return found
