"""Reading a config file: JSON or YAML, without duplicate keys and without aliases that blow up to gigabytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from datasets_lib.errors import InputError, MissingFileError
from datasets_lib.foreign import entries, is_folder, reading

ENDINGS = (".json", ".yaml", ".yml")
OTHERS = {
    ".jsonc": "write it without comments as .json, or as .yaml",
    ".json5": "write it without comments as .json, or as .yaml",
    ".toml": "scripts/import_config.py makes a config of one of kohya's",
    ".py": "a config is data, not a program",
}
MAX_FILE_BYTES = 1 << 20
MAX_YAML_NODES = 100_000  # after aliases are expanded


class ConfigError(InputError):
    """Lists all problems of a configuration, one per line."""

    def __init__(self, *problems: str) -> None:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{count} in the configuration:\n" + "\n".join(f"  {problem}" for problem in problems))


def read_config_file(path: Path) -> dict[str, Any]:
    """Reads a mapping from a file or pipe; raises MissingFileError, or ConfigError for what is no config."""
    text = _read_text(path)
    kind = "JSON" if path.suffix.lower() == ".json" else "YAML"
    try:
        document = json.loads(text, object_pairs_hook=_no_duplicates) if kind == "JSON" else _read_yaml(text)
    except (ValueError, RecursionError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path} cannot be read as {kind}: {error}") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{path} holds {type(document).__name__}; it must hold two sections, `base` and the task's")
    if not isinstance(schema := document.pop("$schema", ""), str):  # only editors read it
        raise ConfigError(f"$schema = {json.dumps(schema, default=str)}: must be text, the schema that an editor reads")
    return document


def _read_text(path: Path) -> str:
    if is_folder(path):
        inside = ", ".join(each.name for each in entries(path) if each.suffix in ENDINGS) or "none"
        raise ConfigError(f"{path} is a folder; give a config file (in it: {inside})")
    with reading(path):
        is_there = path.exists()
    if not is_there:
        raise MissingFileError(
            f"config file {path} does not exist (searched {path.absolute()}); see configs/ for examples"
        )
    ending = path.suffix.lower()
    if ending not in (*ENDINGS, ""):
        advice = f"; {OTHERS[ending]}" if ending in OTHERS else ""
        raise ConfigError(f"{path}: a config's name ends in {', '.join(ENDINGS)}{advice}")
    with reading(path), path.open("rb") as file:  # a pipe, such as <(command), has no size
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{path} has too many bytes; a config has at most {MAX_FILE_BYTES}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"found duplicate key {name}")
    return dict(pairs)


def _read_yaml(text: str) -> Any:
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    if node is not None and _expanded_size(node, {}) > MAX_YAML_NODES:
        raise InputError(f"its aliases expand to more than {MAX_YAML_NODES} values; write them out")
    loaded = OmegaConf.create(text) if text.strip() else None  # reads 1e-4 as a number, which plain PyYAML does not
    return OmegaConf.to_container(loaded) if loaded is not None else None


def _expanded_size(node: yaml.Node, sizes: dict[int, int]) -> int:
    if id(node) in sizes:
        return sizes[id(node)]
    sizes[id(node)] = MAX_YAML_NODES + 1  # a node that contains itself is endless
    children = node.value if isinstance(node, yaml.SequenceNode) else []
    if isinstance(node, yaml.MappingNode):
        children = [child for pair in node.value for child in pair]
    sizes[id(node)] = 1 + sum(_expanded_size(child, sizes) for child in children)
    return sizes[id(node)]
