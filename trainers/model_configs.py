"""Checks files of others' models before a library reads them: what could hang it, fill the memory, or name code."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from datasets_lib.errors import InputError
from datasets_lib.foreign import check_regular, read_json, shown

INDEX = "model_index.json"
ADAPTER = "adapter_config.json"
OWN_PIPELINE = ["pipeline", "ClassConditionalPipeline"]  # the file beside, and the class: ours is taken by its name
READ = (".json", ".txt", ".safetensors")
BLOBS = "blobs"  # folder of the hub's cache to which all links of a snapshot lead
CONFIG_BYTES, TEXT_BYTES = 8 << 20, 64 << 20  # at most, of a config, and of a tokenizer's file

REFUSED = {  # what makes libraries import, or run, what a file names
    "auto_map": "names code, which is not run; take a model that needs none",
    "quantization_config": "says that its weights are quantized; take those in full or half precision",
    "compression_config": "says that its weights are compressed; take those in full or half precision",
}
LIMITS = {  # of numbers that set how much is built or computed before anything is compared, or that divide
    "num_train_timesteps": (1, 100_000),
    "steps_offset": (0, 1000),
    "sample_size": (1, 4096),
    "block_out_channels": (1, 100_000),
    "scaling_factor": (1e-6, 1e6),
    "shift_factor": (-1e6, 1e6),
    "dropout": (0, 1),
    "attention_dropout": (0, 1),
}
LAYERS = (0, 1000)  # of keys that hold this word
CHOICES = {
    "timestep_spacing": ("linspace", "leading", "trailing"),
    "_attn_implementation": ("eager", "sdpa"),  # with owner/name transformers runs code from the hub
    "attn_implementation": ("eager", "sdpa"),
}


def check_files(folder: Path, is_part: bool = False) -> None:
    """Raises ValueError or OSError for files that could hang a reader, fill the memory or name code; none is imported.

    A hub name is no folder, and passes; a part of a pipeline has no parts.
    """
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if path.suffix in READ and path.exists():  # a link may lead nowhere
            check_regular(path)
            _check_link(path)
        if path.suffix in READ[:2] and path.exists() and path.stat().st_size > TEXT_BYTES:
            raise InputError(f"{shown(path)}: has {path.stat().st_size:,} bytes, and at most {TEXT_BYTES:,} are read")
    if (folder / ADAPTER).exists():  # transformers would load it, and the base model that it names instead of this one
        raise InputError(f"{shown(folder / ADAPTER)}: an adapter beside a model's weights is not read; remove the file")
    index = folder / INDEX
    if is_part and index.exists():  # diffusers would read it as a pipeline, whose index could name code
        raise InputError(f"{shown(index)}: a pipeline inside of a pipeline is not read; remove the file")
    for name in _components(read_config(index), index) if index.is_file() and not is_part else ():
        check_files(folder / name, is_part=True)
    for path in sorted(folder.glob("*.safetensors.index*.json")):
        _check_shards(path)
    for path in sorted(folder.glob("*config.json")):  # config.json, and those of schedulers, tokenizers, processors
        if path.is_file():
            read_config(path)


def _check_link(path: Path) -> None:
    """Raises ValueError for a link out of a model's folder to a text, which a pipeline made of it would publish."""
    if path.suffix in READ[:2] and path.is_symlink():
        folder, leads_to = path.parent, path.resolve()
        folder = folder.parent if (folder.parent / INDEX).is_file() else folder
        if not leads_to.is_relative_to(folder.resolve()) and leads_to.parent.name != BLOBS:
            raise InputError(f"{shown(path)}: is a link that leads out of the model's folder; put the file there")


def _check_shards(path: Path) -> None:
    """Raises ValueError for a list of shards that names files outside of its folder."""
    found = read_json(path, TEXT_BYTES)
    shards = found.get("weight_map") if isinstance(found, dict) else None
    names = set(map(str, shards.values())) if isinstance(shards, dict) else {""}
    for name in sorted(names):
        if not name or name != Path(name).name:
            raise InputError(f"{shown(path)}: weight_map must name files beside it, found {shown(name) or 'none'}")


def read_config(path: Path) -> dict[str, Any]:
    """Reads a config, a JSON object; OSError or ValueError for anything else, and for values that are refused."""
    found = read_json(path, CONFIG_BYTES)
    if not isinstance(found, dict):
        raise InputError(f"{shown(path)}: must hold a JSON object, found {shown(type(found).__name__)}")
    for problem in _config_problems(found):
        raise InputError(f"{shown(path)}: {problem}")
    return found


def _config_problems(config: dict[str, Any]) -> Iterator[str]:
    parts = [config]
    for part in parts:
        for key, value in part.items():
            if value and key in REFUSED:
                yield f"its {key} {REFUSED[key]}"
            elif isinstance(value, dict):  # such as those of the two sides of a CLIP; classes may have any names
                parts += [] if key in ("id2label", "label2id") else [value]
            elif value is not None and value not in CHOICES.get(key, (value,)):
                yield f"{key} = {shown(value)} must be one of {', '.join(CHOICES[key])}"
            elif value is not None and (key in LIMITS or "layers" in key):
                least, most = LIMITS.get(key, LAYERS)
                if key == "block_out_channels" and not isinstance(value, list):
                    yield f"{key} = {shown(value)} must be a list of numbers"
                elif not all(least <= number <= most for number in numbers_in(value, key in LIMITS)):
                    yield f"{shown(key)} = {shown(value)} must be from {least:g} to {most:g}"


def numbers_in(value: Any, strict: bool) -> Iterator[float]:
    """Yields a number, or those of a list; for anything else NaN, which lies in no range, or nothing unless strict."""
    for each in value if isinstance(value, list | tuple) else [value]:
        if isinstance(each, list | tuple):
            yield from numbers_in(each, strict)
        elif isinstance(each, int | float):
            yield each
        elif strict:
            yield math.nan


def _components(index: dict[str, Any], path: Path) -> Iterator[str]:
    """Yields the names of a pipeline's parts; ValueError for a class outside of diffusers and transformers."""
    from diffusers import pipelines

    name = index.get("_class_name")
    if not isinstance(name, str | None) and name != OWN_PIPELINE:
        raise InputError(f"{shown(path)}: _class_name = {shown(name)} names code, which is not run")
    for part, value in index.items():
        if part == "_class_name" or not isinstance(value, list) or value[:1] == [None]:  # no part, or none that is here
            continue
        named = len(value) == 2 and all(isinstance(text, str | None) for text in value)
        library = getattr(pipelines, str(value[0]), None) if named else None  # such as stable_diffusion
        own = isinstance(library, ModuleType) and library.__name__.startswith("diffusers.")
        if not named or not (own or value[0] in ("diffusers", "transformers")):
            raise InputError(
                f"{shown(path)}: {shown(part)} = {shown(value)} must be [library, class] of diffusers or transformers; "
                "code that a pipeline brings along is not run"
            )
        if not part.isidentifier():
            raise InputError(f"{shown(path)}: {shown(part)} is no name of a part of a pipeline")
        yield part
