"""From a file of another trainer to the text of our configuration."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, NamedTuple

from datasets_lib.errors import InputError, MissingFileError
from datasets_lib.foreign import read_bytes, read_json, shown
from trainers.inference.foreign_configs import diffusers_scripts, kohya
from trainers.inference.foreign_configs.effects import drop_without_effect
from trainers.inference.foreign_configs.shell import find_command
from trainers.inference.foreign_configs.translation import Translation
from trainers.inference.foreign_configs.written import as_yaml

BYTES = 1 << 20
OF_DATA = ("general", "datasets")


class Imported(NamedTuple):
    text: str  # of the YAML file
    translation: Translation


def import_config(path: Path, dataset_config: Path | None = None) -> Imported:
    """Reads a .toml of sd-scripts or a text with a command line; InputError or MissingFileError if it is neither."""
    try:
        made, kind = (
            _from_toml(path, dataset_config) if path.suffix.lower() == ".toml" else _from_shell(path, dataset_config)
        )
    except InputError as error:
        text = str(error)
        raise InputError(text if text.startswith(shown(path)) else f"{shown(path)}: {text}") from None
    drop_without_effect(made)
    return Imported(as_yaml(made, f"{path.name} ({kind})"), made)


def _from_toml(path: Path, dataset_config: Path | None) -> tuple[Translation, str]:
    options = _flat(_read_toml(path))
    return _of_kohya(options, path, dataset_config, None), "a file of sd-scripts"


def _of_kohya(options: dict[str, Any], path: Path, dataset_config: Path | None, script: str | None) -> Translation:
    if dataset_config is None and (named := options.get("dataset_config")) is not None:
        dataset_config = _found(str(named), path.parent, "dataset_config")
    return kohya.translate(options, _read_dataset(dataset_config) if dataset_config else {}, path.parent, script)


def _from_shell(path: Path, dataset_config: Path | None) -> tuple[Translation, str]:
    try:
        content = read_bytes(path, BYTES).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError("is no text") from None
    command = find_command(content, shown(path), [*diffusers_scripts.SCRIPTS, *kohya.SCRIPTS])
    kind = f"a command line of {command.script}.py"
    if command.script in diffusers_scripts.SCRIPTS:
        if dataset_config is not None:
            raise InputError(f"--dataset-config is of sd-scripts, and this is {kind}")
        return diffusers_scripts.translate(command), kind
    options = command.options
    if (named := options.get("config_file")) is not None:
        name = str(named) if str(named).endswith(".toml") else f"{named}.toml"
        options = _flat(_read_toml(_found(name, path.parent, "config_file"))) | options  # the command line wins
    return _of_kohya(options, path, dataset_config, command.script), kind


def _found(name: str, beside: Path, option: str) -> Path:
    paths = (Path(name), beside / name)
    for path in paths:
        if path.is_file():
            return path
    raise MissingFileError(
        f"{option} = {shown(name)}: there is no such file, also not in {shown(beside)}; correct its path"
    )


def _flat(document: dict[str, Any]) -> dict[str, Any]:
    """Sections are for the reader alone."""
    if isinstance(document.get("datasets"), list):
        raise InputError(
            "is a dataset_config; give the file of the trainer's options, and this one by --dataset-config"
        )
    flat: dict[str, Any] = {}
    for key, value in document.items():
        flat |= value if isinstance(value, dict) else {key: value}
    return flat


def _read_dataset(path: Path) -> dict[str, Any]:
    document = read_json(path, BYTES) if path.suffix.lower() == ".json" else _read_toml(path)
    datasets = document.get("datasets") if isinstance(document, dict) else None
    if not isinstance(datasets, list) or not all(_is_dataset(dataset) for dataset in datasets):
        raise InputError(f"{shown(path)}: has no [[datasets]] with [[datasets.subsets]]; is it a dataset_config?")
    if not isinstance(document.get("general", {}), dict):
        raise InputError(f"{shown(path)}: general must be a section")
    return document


def _is_dataset(dataset: Any) -> bool:
    subsets = dataset.get("subsets", []) if isinstance(dataset, dict) else None
    return isinstance(subsets, list) and all(isinstance(subset, dict) for subset in subsets)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(read_bytes(path, BYTES).decode("utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{shown(path)}: cannot be read as TOML ({shown(error)})") from None
