"""Reads networks and pipelines whose files may come from others: safetensors only, and no code that they name."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets_lib.foreign import check_regular, read_json, shown

INDEX = "model_index.json"
ADAPTER = "adapter_config.json"
READ = (".json", ".txt", ".safetensors")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
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
}
LAYERS = (0, 1000)  # of keys that hold this word
CHOICES = {
    "timestep_spacing": ("linspace", "leading", "trailing"),
    "_attn_implementation": ("eager", "sdpa"),  # with owner/name transformers runs code from the hub
    "attn_implementation": ("eager", "sdpa"),
}


def read_model(
    kind: Any, source: str | Path, place: str | None = None, subfolder: str | None = None, **options: Any
) -> Any:
    """Reads what has weights, by kind.from_pretrained of diffusers or transformers; `place` names it in messages.

    Raises FileNotFoundError if nothing can be read, and ValueError for files that are refused.
    """
    place = shown(place or source)
    if hasattr(kind, "download") and not Path(source).is_dir():  # a pipeline on the hub: checked before it is loaded
        names = ("revision", "variant", "safety_checker")
        wanted = {name: options[name] for name in names if name in options}
        with reading(kind, source, place):
            source = kind.download(source, use_safetensors=True, **wanted)
    folder = Path(source) / (subfolder or "")
    check_files(folder, place)
    options |= {"subfolder": subfolder} if subfolder else {}
    _check_size(kind, folder, place)
    with reading(kind, folder, place):
        return kind.from_pretrained(source, use_safetensors=True, **options)


def read_part(kind: Any, source: str | Path, place: str | None = None, **options: Any) -> Any:
    """Reads what has no weights as `read_model` does: a tokenizer, a scheduler, a config."""
    place = shown(place or source)
    check_files(Path(source), place)
    with reading(kind, source, place, ""):
        return kind.from_pretrained(source, **options)


@contextmanager
def reading(kind: Any, source: str | Path, place: str, wanted: str = " in safetensors format") -> Iterator[None]:
    """Turns whatever a library raises for the files of others into a message."""
    try:
        yield
    except Exception as error:
        reason = shown((str(error).strip() or type(error).__name__).splitlines()[0])
        advice = "give a local folder, or a hub name that can be reached"
        for pickle in _pickles(Path(source)):
            advice = (
                f"{shown(pickle)} is not read, because such a file can run code; if you trust it, convert it: "
                f"{kind.__name__}.from_pretrained(FOLDER, use_safetensors=False).save_pretrained(NEW_FOLDER)"
            )
        what = f"no {kind.__name__}{wanted} could be read"
        raise FileNotFoundError(f"{place}: {what}; {advice} ({reason})") from None


def _pickles(folder: Path) -> list[str]:
    """Returns the names of files in a model's folder, or in those of its parts, that stand there for safetensors."""
    folders = [path for path in (folder, *folder.glob("*")) if path.is_dir() and not any(path.glob("*.safetensors"))]
    return [str(path.relative_to(folder)) for each in folders for path in each.iterdir() if path.suffix in PICKLES]


def check_files(folder: Path, place: str) -> None:
    """Raises ValueError or OSError for files that could hang a reader, fill the memory or name code; none is imported.

    A hub name is no folder, and passes.
    """
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if path.suffix in READ and path.exists():  # a link may lead nowhere
            check_regular(path)
        if path.suffix in READ[:2] and path.exists() and path.stat().st_size > TEXT_BYTES:
            raise ValueError(f"{shown(path)}: has {path.stat().st_size:,} bytes, and at most {TEXT_BYTES:,} are read")
    if (folder / ADAPTER).exists():  # transformers would load it, and the base model that it names instead of this one
        raise ValueError(f"{shown(folder / ADAPTER)}: an adapter beside a model's weights is not read; remove the file")
    index = folder / INDEX
    for name in _components(read_config(index), index) if index.is_file() else ():
        check_files(folder / name, place)
    for path in sorted(folder.glob("*config.json")):  # config.json, and those of schedulers, tokenizers, processors
        if path.is_file():
            read_config(path)


def read_config(path: Path) -> dict[str, Any]:
    """Reads a config, a JSON object; OSError or ValueError for anything else, and for values that are refused."""
    found = read_json(path, CONFIG_BYTES)
    if not isinstance(found, dict):
        raise ValueError(f"{shown(path)}: must hold a JSON object, found {shown(type(found).__name__)}")
    for problem in _config_problems(found):
        raise ValueError(f"{shown(path)}: {problem}")
    return found


def _config_problems(config: dict[str, Any]) -> Iterator[str]:
    parts = [config]
    for part in parts:
        for key, value in part.items():
            if value and key in REFUSED:
                yield f"its {key} {REFUSED[key]}"
            elif isinstance(value, dict):
                parts.append(value)  # such as those of the two sides of a CLIP
            elif value is not None and value not in CHOICES.get(key, (value,)):
                yield f"{key} = {shown(value)} must be one of {', '.join(CHOICES[key])}"
            elif value is not None and (key in LIMITS or "layers" in key):
                least, most = LIMITS.get(key, LAYERS)
                if not all(least <= number <= most for number in _numbers(value, key in LIMITS)):
                    yield f"{shown(key)} = {shown(value)} must be from {least:g} to {most:g}"


def _numbers(value: Any, strict: bool) -> Iterator[float]:
    """Yields a number, or those of a list; for anything else NaN, which lies in no range, or with strict off nothing."""
    for each in value if isinstance(value, list) else [value]:
        if isinstance(each, list):
            yield from _numbers(each, strict)
        elif isinstance(each, int | float):
            yield each
        elif strict:
            yield math.nan


def _components(index: dict[str, Any], path: Path) -> Iterator[str]:
    """Yields the names of a pipeline's parts; ValueError for a class outside of diffusers and transformers."""
    from diffusers import pipelines

    name = index.get("_class_name")
    if not isinstance(name, str | None):
        raise ValueError(f"{shown(path)}: _class_name = {shown(name)} names code, which is not run")
    for part, value in index.items():
        if not isinstance(value, list):
            continue
        known = len(value) == 2 and all(isinstance(text, str | None) for text in value)
        if not known or not (value[0] in (None, "diffusers", "transformers") or hasattr(pipelines, value[0])):
            raise ValueError(
                f"{shown(path)}: {shown(part)} = {shown(value)} must be [library, class] of diffusers or transformers; "
                "code that a pipeline brings along is not run"
            )
        if not part.isidentifier():
            raise ValueError(f"{shown(path)}: {shown(part)} is no name of a part of a pipeline")
        if value[0] is not None:
            yield part


def _check_size(kind: Any, folder: Path, place: str) -> None:
    """Raises ValueError if a network would have more weights than its files can hold: its memory is not asked for."""
    import torch
    from safetensors import safe_open

    files = list(folder.glob("*.safetensors"))
    if not (isinstance(kind, type) and issubclass(kind, torch.nn.Module) and files):
        return
    build: Any = kind
    with reading(kind, folder, place), torch.device("meta"):
        for path in files:
            safe_open(path, "pt")  # checks the header, whose tensors must lie within the file
        if hasattr(kind, "from_config"):  # of diffusers
            network = build.from_config(build.load_config(folder))
        else:
            network = build(build.config_class.from_pretrained(folder))
    weights, held = sum(value.numel() for value in network.parameters()), sum(path.stat().st_size for path in files)
    if weights > held:
        found = f"its config makes a network of {weights:,} weights, and its files have {held:,} bytes"
        raise ValueError(f"{place}: {found}; take a folder whose files belong together")
