"""Networks' files: where configs and weights are read from, and whether they fit the run's pictures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from trainers.base import BaseConfig

if TYPE_CHECKING:
    from diffusers import ModelMixin

MODELS_DIR = Path(__file__).parents[2] / "configs" / "models"

Settings = dict[str, Any]


class Grid(NamedTuple):
    """What a network sees: channels, and pixels of a side; `source` names the options that say so."""

    channels: int
    resolution: int
    source: tuple[str, str] = ("base.channels", "base.resolution")

    @classmethod
    def of(cls, base: BaseConfig) -> Grid:
        """The run's pictures."""
        return cls(base.channels, base.resolution)


def files_digest(*folders: Path) -> str:
    """16 hex digits of the content of networks' and tokenizers' files: weights, configs, vocabularies."""
    content = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.iterdir()):
            if path.suffix in (".json", ".txt", ".safetensors"):
                with path.open("rb") as file:
                    content.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return content.hexdigest()[:16]


def find_model_config(model_config: str) -> Path:
    """The JSON file that `model_config` means; FileNotFoundError lists the places that were searched."""
    places = [Path(model_config) / "config.json", Path(model_config), MODELS_DIR / f"{model_config}.json"]
    for place in places:
        if place.is_file():
            return place
    names = ", ".join(sorted(path.stem for path in MODELS_DIR.glob("*.json")))
    searched = ", ".join(str(place) for place in places[:2])
    raise FileNotFoundError(f"no file at {searched}, and the names in configs/models are {names}")


def read_settings(model_config: str | None, default: Callable[[Grid], Settings], grid: Grid) -> Settings:
    """A network's config without diffusers' private keys, or the default one; its sample size is the grid's.

    Where it does not say how many channels it has, it gets the grid's.
    """
    if model_config is None:
        settings = default(grid)
    else:
        settings = json.loads(find_model_config(model_config).read_text(encoding="utf-8"))
    public = {key: value for key, value in settings.items() if not key.startswith("_")}
    silent = {"in_channels": grid.channels, "out_channels": grid.channels}
    return silent | public | {"sample_size": grid.resolution}


def settings_problems(
    network: str, read: Callable[[], Settings], check: Callable[[Settings], Iterator[str]]
) -> Iterator[str]:
    """Yields what keeps a config from being one of `network`, before anything heavy is loaded."""
    try:
        settings = read()
    except (FileNotFoundError, ValueError, AttributeError) as error:
        yield f"must be a folder with config.json, a JSON file, or a name in configs/models: {error}"
        return
    try:
        yield from check(settings)
    except TypeError as error:
        yield f"is no config of {network}: {error}"


def channel_misfits(settings: Mapping[str, Any], grid: Grid) -> Iterator[str]:
    """Yields where a config has other channels than what the network sees."""
    for option in ("in_channels", "out_channels"):
        if settings.get(option, 3) != grid.channels:
            found = settings.get(option, 3)
            yield f"has {option} = {found}, {grid.source[0]} is {grid.channels}; make them equal"


def misfits(settings: Mapping[str, Any], grid: Grid, levels: int) -> Iterator[str]:
    """Yields where a config does not fit what the network sees; `levels` it has where the config is silent."""
    yield from channel_misfits(settings, grid)
    halvings = len(settings.get("block_out_channels", (0,) * levels)) - 1
    if grid.resolution % 2**halvings:
        size = f"{grid.source[1]} = {grid.resolution} must be a multiple of {2**halvings}"
        yield f"halves the picture {halvings} times; {size}"


def load_pretrained(
    kind: type[ModelMixin],
    pretrained: str,
    subfolder: str,
    settings: Mapping[str, Any],
    misfits: Callable[[Mapping[str, Any]], Iterator[str]],
) -> Any:
    """Reads a network of this kind from a folder, its sub-folder or the hub, in float32.

    FileNotFoundError where nothing can be read; ValueError for another kind, for one that does not fit what it is to
    see, and for one whose config has not what the task decides, the `settings`.
    """
    import torch

    option = f"pretrained_model_name_or_path = {pretrained}"
    place = {"subfolder": None if (Path(pretrained) / "config.json").is_file() else subfolder}
    try:
        found = kind.load_config(pretrained, **place).get("_class_name", kind.__name__)
        if found != kind.__name__:
            raise ValueError(f"{option}: must be a {kind.__name__}, found a {found}")
        network = kind.from_pretrained(pretrained, **place, use_safetensors=True, torch_dtype=torch.float32)
    except OSError as error:
        raise FileNotFoundError(
            f"{option}: no {kind.__name__} in safetensors format could be read; give a local folder with config.json, "
            f"or with {subfolder}/config.json, or a hub name that can be reached ({error})"
        ) from None
    for misfit in misfits(network.config):
        raise ValueError(f"{option}: {misfit}")
    for name, value in settings.items():
        if network.config.get(name) != value:
            raise ValueError(f"{option}: has {name} = {network.config.get(name)}, and this run needs {value}")
    return network
