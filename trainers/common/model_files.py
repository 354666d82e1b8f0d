"""Finds and reads networks' configs and weights, and checks that they fit the run's pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from datasets_lib.errors import InputError, MissingFileError
from datasets_lib.file_hashes import sha256
from trainers.base import BaseConfig
from trainers.model_configs import check_files, read_config
from trainers.pretrained import read_model, reading
from trainers.single_file.header import is_single_file

if TYPE_CHECKING:
    from diffusers import ModelMixin

MODELS_DIR = Path(__file__).parents[2] / "configs" / "models"

Settings = dict[str, Any]
Misfits = Callable[[Mapping[str, Any]], Iterator[str]]


class Grid(NamedTuple):
    """A network's input: channels and side length; `source` names the options that set them, for messages."""

    channels: int
    resolution: int
    source: tuple[str, str] = ("base.channels", "base.resolution")

    @classmethod
    def of(cls, base: BaseConfig) -> Grid:
        """The grid of the run's pictures."""
        return cls(base.channels, base.resolution)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.resolution, self.resolution


def files_digest(*folders: Path, hash_of: Callable[[Path], str] = sha256) -> str:
    """Hashes the files of networks and tokenizers (weights, configs, vocabularies): 16 hex digits."""
    content = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.iterdir()):
            if path.suffix in (".json", ".txt", ".safetensors"):
                content.update(path.name.encode() + bytes.fromhex(hash_of(path)))
    return content.hexdigest()[:16]


def find_model_config(model_config: str) -> Path:
    """Finds the JSON file that `model_config` names; FileNotFoundError lists the places searched."""
    places = [Path(model_config) / "config.json", Path(model_config), MODELS_DIR / f"{model_config}.json"]
    for place in places:
        if place.is_file():
            return place
    names = ", ".join(sorted(path.stem for path in MODELS_DIR.glob("*.json")))
    searched = ", ".join(str(place) for place in places[:2])
    raise MissingFileError(f"no file at {searched}, and the names in configs/models are {names}")


def read_file(model_config: str) -> Settings:
    """Reads a network's config without diffusers' private keys."""
    settings = read_config(find_model_config(model_config))
    return {key: value for key, value in settings.items() if not key.startswith("_")}


def read_settings(model_config: str | None, default: Callable[[Grid], Settings], grid: Grid) -> Settings:
    """Reads a network's config, or makes the default one.

    Its sample size is the grid's, and so are its channels unless the file sets them.
    """
    settings = default(grid) if model_config is None else read_file(model_config)
    silent = {"in_channels": grid.channels, "out_channels": grid.channels}
    return silent | settings | {"sample_size": grid.resolution}


def settings_problems(
    network: str, read: Callable[[], Settings], check: Callable[[Settings], Iterator[str]]
) -> Iterator[str]:
    """Yields the problems of a config of `network`, without importing heavy libraries."""
    try:
        settings = read()
    except (OSError, ValueError) as error:
        yield f"must be a folder with config.json, a JSON file, or a name in configs/models: {error}"
        return
    try:
        yield from check(settings)
    except TypeError as error:
        yield f"is no config of {network}: {error}"


def channel_misfits(settings: Mapping[str, Any], grid: Grid) -> Iterator[str]:
    """Yields the channels of a config that differ from the grid's."""
    for option in ("in_channels", "out_channels"):
        if settings.get(option, 3) != grid.channels:
            found = settings.get(option, 3)
            yield f"has {option} = {found}, {grid.source[0]} is {grid.channels}; make them equal"


def misfits(settings: Mapping[str, Any], grid: Grid, levels: int) -> Iterator[str]:
    """Yields how a config does not fit the grid; `levels` is the default number of resolution levels."""
    yield from channel_misfits(settings, grid)
    halvings = len(settings.get("block_out_channels", (0,) * levels)) - 1
    if grid.resolution % 2**halvings:
        size = f"{grid.source[1]} = {grid.resolution} must be a multiple of {2**halvings}"
        yield f"halves the picture {halvings} times; {size}"


def load_pretrained(
    kind: type[ModelMixin],
    place: tuple[str, str],
    folder: str,
    misfits: Misfits,
    settings: Mapping[str, Any] = MappingProxyType({}),
    **options: Any,
) -> Any:
    """Reads a network of this kind; `place` is the name and the value of the option that locates it.

    `folder` is its sub-folder in pipelines, `options` are further arguments of diffusers' from_pretrained, of which
    torch_dtype is float32 if it is not given. Raises FileNotFoundError if nothing can be read, and ValueError for
    another kind of network, for missing weights, for `misfits` of its config, and for a config that differs from the
    task's `settings`.
    """
    import torch

    source, shown = place[1], " = ".join(place)
    if is_single_file(source):
        dtype = options.get("torch_dtype", torch.float32)
        return _checked(shown, read_model(kind, source, shown, folder, torch_dtype=dtype), misfits, settings)
    options = {"subfolder": None if (Path(source) / "config.json").is_file() else folder} | options
    check_files(Path(source) / (options["subfolder"] or ""))
    with reading(kind, source, shown):
        found = kind.load_config(source, **options).get("_class_name", kind.__name__)
    if found != kind.__name__:
        raise InputError(f"{shown}: must be of class {kind.__name__}, found {found}")
    options.setdefault("torch_dtype", torch.float32)
    options["output_loading_info"] = True
    network, info = read_model(kind, source, shown, **options)
    if info["missing_keys"]:
        raise InputError(f"{shown}: its weights lack {info['missing_keys'][0]}")
    return _checked(shown, network, misfits, settings)


def _checked(shown: str, network: Any, misfits: Misfits, settings: Mapping[str, Any]) -> Any:
    """Returns a network whose config fits; ValueError otherwise."""
    for misfit in misfits(network.config):
        raise InputError(f"{shown}: {misfit}")
    for name, value in settings.items():
        if network.config.get(name) != value:
            raise InputError(f"{shown}: has {name} = {network.config.get(name)}, and this run needs {value}")
    return network
