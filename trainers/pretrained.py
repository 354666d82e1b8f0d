"""Reads networks and pipelines whose files may come from others: safetensors only, and no code that they name."""

from __future__ import annotations

import errno
import inspect
import math
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from datasets_lib.errors import InputError, MissingFileError
from datasets_lib.foreign import shown
from trainers.model_configs import INDEX, OWN_PIPELINE, check_files, numbers_in, read_config
from trainers.single_file.header import PICKLES, is_single_file
from trainers.single_file.reading import read_network
from trainers.single_file.recognition import SingleFile, open_autoencoder, open_single_file
from trainers.single_file.skeleton import write_skeleton
from trainers.weight_files import weight_files

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


def hub_name(value: Any) -> str | None:
    """Returns what can be a model's name on the hub, owner/name, and is no file or folder here; None for others."""
    if not isinstance(value, str) or HUB_NAME.fullmatch(value) is None:
        return None
    return None if len(value) > 96 or "--" in value or ".." in value or Path(value).exists() else value


def read_model(
    kind: Any, source: str | Path, place: str | None = None, subfolder: str | None = None, **options: Any
) -> Any:
    """Reads what has weights, by kind.from_pretrained of diffusers or transformers; `place` names it in messages.

    A source may be a single file, whose networks have the names of a pipeline's folders, as `subfolder`.
    Raises FileNotFoundError if nothing can be read, and ValueError for files that are refused.
    """
    place = shown(place or source)
    if is_single_file(source):
        opened = (open_autoencoder if subfolder == "vae" else open_single_file)(Path(source), place)
        return _read_single_file(kind, opened, subfolder, options)
    if hasattr(kind, "download") and not Path(source).is_dir():  # a pipeline on the hub: checked before it is loaded
        names = ("revision", "variant", "safety_checker")
        wanted = {name: options[name] for name in names if name in options}
        with reading(kind, source, place):
            source = kind.download(source, use_safetensors=True, **wanted)
    folder = Path(source) / (subfolder or "")
    kind = _own_class(folder) or kind if getattr(kind, "__name__", "") == "DiffusionPipeline" else kind
    _check_source(kind, source, place, " in safetensors format", options | {"subfolder": subfolder})
    options = _without_checker(kind, folder, options) | ({"subfolder": subfolder} if subfolder else {})
    for network, own in _networks(kind, folder):
        _check_size(network, own, place)
    with reading(kind, folder, place):
        found = kind.from_pretrained(source, use_safetensors=True, **options)
    whole = found[0] if isinstance(found, tuple) else found  # with the option output_loading_info
    for part in getattr(whole, "components", {"": whole}).values():
        _check_read(part, place)
    return found


def _read_single_file(kind: Any, single: SingleFile, network: str | None, options: dict[str, Any]) -> Any:
    """Reads a network of a single file, or a pipeline of all of them, whose other parts are written for it."""
    import torch

    asked = options.pop("dtype", None) or options.pop("torch_dtype", None) or torch.float32
    if network is not None:
        return read_network(single, network, kind, asked)
    dtypes = asked if isinstance(asked, dict) else {"default": asked}
    if not hasattr(kind, "download"):
        raise single.error(f"holds a pipeline, and no {kind.__name__}")
    with tempfile.TemporaryDirectory() as made:
        write_skeleton(Path(made), single)
        networks = {
            own.name: read_network(single, own.name, part, dtypes.get(own.name, dtypes["default"]))
            for part, own in _networks(kind, Path(made))
            if own.name in single.family.networks
        }
        others = {name: value for name, value in options.items() if name not in ("revision", "variant")}
        pipeline = read_model(kind, made, single.place, **others, **networks)
        pipeline.register_to_config(_name_or_path=str(single.path))
        return pipeline


def _own_class(folder: Path) -> Any:
    """Returns the class of a pipeline of ours, which diffusers would look for in the folder's code; or else None."""
    index = folder / INDEX
    name = read_config(index).get("_class_name") if index.is_file() else None
    ours = name in (OWN_PIPELINE, OWN_PIPELINE[1])  # the name alone before folders brought their class
    return import_module("trainers.common.class_pipeline").ClassConditionalPipeline if ours else None


def _without_checker(kind: Any, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Leaves out the options of a safety checker for a pipeline that knows none, such as SDXL's: diffusers warns."""
    import diffusers

    index = folder / INDEX
    name = str(read_config(index).get("_class_name")) if hasattr(kind, "download") and index.is_file() else ""
    own = getattr(diffusers, name, kind)  # or one of ours
    known = inspect.signature(own).parameters if isinstance(own, type) else options
    return {name: value for name, value in options.items() if "safety_checker" not in name or name in known}


def read_part(kind: Any, source: str | Path, place: str | None = None, **options: Any) -> Any:
    """Reads what has no weights as `read_model` does: a tokenizer, a scheduler, a config."""
    place = shown(place or source)
    _check_source(kind, source, place, "", options)
    with reading(kind, source, place, ""):
        found = kind.from_pretrained(source, **options)
    _check_read(found, place)
    return found


def _check_source(kind: Any, source: str | Path, place: str, wanted: str, options: Mapping[str, Any]) -> None:
    """Checks a folder's files, or the configs that a hub name leads to, which are downloaded before the weights."""
    from huggingface_hub import snapshot_download

    folder, subfolder = Path(source), options.get("subfolder") or ""
    if not folder.is_dir():
        names = [f"{subfolder and subfolder + '/'}*{end}" for end in (".json", ".txt")]
        with reading(kind, source, place, wanted):
            found = snapshot_download(str(source), revision=options.get("revision"), allow_patterns=names)
        folder = Path(found)
    check_files(folder / subfolder)


@contextmanager
def reading(kind: Any, source: str | Path, place: str, wanted: str = " in safetensors format") -> Iterator[None]:
    """Turns whatever a library raises for the files of others into a message."""
    try:
        yield
    except Exception as error:
        reason = shown((str(error).strip() or type(error).__name__).splitlines()[0])
        advice = "give a local folder, or a hub name that can be reached"
        if "no file named" in reason and (variant := _only_variant(Path(source))) is not None:
            save = f'{kind.__name__}.from_pretrained(FOLDER, variant="{variant}").save_pretrained(NEW_FOLDER)'
            advice = (
                f"it has weights of the variant {variant} alone: train with the task's option variant={variant}, or "
            )
            advice += f"save it without one: {save}"
        for pickle in _pickles(Path(source)):
            advice = (
                f"{shown(pickle)} is not read, because such a file can run code; if you trust it, convert it: "
                f"{kind.__name__}.from_pretrained(FOLDER, use_safetensors=False).save_pretrained(NEW_FOLDER)"
            )
        what = f"no {kind.__name__}{wanted} could be read"
        found = MissingFileError(f"{place}: {what}; {advice} ({reason})")
        if isinstance(error, MemoryError) or "allocate memory" in reason:
            found.errno = errno.ENOMEM  # for the dry run, which then suggests what needs less
        raise found from None


def _only_variant(folder: Path) -> str | None:
    """Returns the variant of a folder's weights, or of those of its parts, if none of them is without one."""
    folders = [path for path in (folder, *folder.glob("*")) if path.is_dir()]
    found = {file.variant for each in folders for file in weight_files(each)}
    return min(filter(None, found), default=None) if None not in found else None


def _pickles(folder: Path) -> list[str]:
    """Returns the names of files in a model's folder, or in those of its parts, that stand there for safetensors."""
    folders = [path for path in (folder, *folder.glob("*")) if path.is_dir() and not any(path.glob("*.safetensors"))]
    return [str(path.relative_to(folder)) for each in folders for path in each.iterdir() if path.suffix in PICKLES]


def _networks(kind: Any, folder: Path) -> Iterator[tuple[Any, Path]]:
    """Yields the class and the folder of what is read: of a pipeline those of its parts."""
    index = folder / INDEX
    if not (hasattr(kind, "download") and index.is_file()):
        yield kind, folder
        return
    for part, value in read_config(index).items():
        if isinstance(value, list) and value[0] in ("diffusers", "transformers"):
            yield getattr(import_module(value[0]), str(value[1]), None), folder / part


def _check_size(kind: Any, folder: Path, place: str) -> None:
    """Raises ValueError if a network would have more weights than its files can hold: its memory is not asked for."""
    import torch
    from diffusers.models.modeling_utils import no_init_weights
    from safetensors import safe_open

    files = list(folder.glob("*.safetensors"))
    if not (isinstance(kind, type) and issubclass(kind, torch.nn.Module) and files):
        return
    build: Any = kind
    with reading(kind, folder, place), torch.device("meta"), no_init_weights():  # initialization is half of the time
        for path in files:
            safe_open(path, "pt")  # checks the header, whose tensors must lie within the file
        if hasattr(kind, "from_config"):  # of diffusers
            network = build.from_config(build.load_config(folder))
        else:
            network = build(build.config_class.from_pretrained(folder))
    weights, held = sum(value.numel() for value in network.parameters()), sum(path.stat().st_size for path in files)
    if weights > held:
        found = f"its config makes a network of {weights:,} weights, and its files have {held:,} bytes"
        raise InputError(f"{place}: {found}; take a folder whose files belong together")


def _check_read(part: Any, place: str) -> None:
    """Raises ValueError for a network whose files lack weights, and for a part of diffusers with a text for a number.

    Libraries notice neither until they compute with it.
    """
    import torch

    for name, weights in part.named_parameters() if isinstance(part, torch.nn.Module) else ():
        if weights.is_meta:
            raise InputError(f"{place}: the weights of {type(part).__name__} lack {shown(name)}")
    config = getattr(part, "config", None)
    for name, option in inspect.signature(type(part).__init__).parameters.items():
        if isinstance(option.default, int | float) and isinstance(config, Mapping):
            value = config.get(name)
            if value is not None and any(map(math.isnan, numbers_in(value, strict=True))):
                found = f"{name} = {shown(value)} in the config of {type(part).__name__}"
                raise InputError(f"{place}: {found} must be a number, or a list of numbers")
