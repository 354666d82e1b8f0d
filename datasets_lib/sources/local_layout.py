"""Checks of a local folder in a hub data set's layout before `datasets` opens anything in it.

`datasets` follows what a README.md, a state.json or a link names to wherever it leads, other machines included.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from datasets_lib.errors import InputError
from datasets_lib.foreign import check_regular, read_bytes, read_json, shown
from datasets_lib.images.files import METADATA_BYTES, check_inside, is_inside
from datasets_lib.images.formats import EXTENSIONS
from datasets_lib.sources.arrow_size import check_plain
from datasets_lib.sources.parquet_size import check_unpacked
from datasets_lib.sources.walk import walk

CARDS = ("README.md", ".huggingface.yaml", "dataset_infos.json")  # which `datasets` reads first
CARD_BYTES, JSON_BYTES = 1 << 20, 16 << 20
DEPTH = 50  # of a card
SPLITS, STATE, INFO = "dataset_dict.json", "state.json", "dataset_info.json"  # written by save_to_disk
# of a card's configuration; others change how libraries parse, such as the separator of a csv, a regular expression
OPTIONS = (
    "config_name", "data_dir", "data_files", "default", "description", "drop_labels", "drop_metadata", "features",
    "version",
)  # fmt: skip
STARS = 3  # in one name of a pattern: more of them take very long to compare
KINDS = (".arrow", ".csv", ".json", ".jsonl", ".parquet", *EXTENSIONS)


class LayoutError(InputError):
    """A folder that is not given to `datasets`."""


def is_saved(folder: Path) -> bool:
    """Whether save_to_disk wrote the folder."""
    return any((folder / name).exists() for name in (SPLITS, STATE))


def check_layout(folder: Path, outside: Sequence[str]) -> None:
    """Raises LayoutError, or OSError, for a folder with links or names of files that lead out of it."""
    try:
        for name in CARDS:
            if (path := folder / name).exists():
                read_bytes(check_inside(path, folder, outside), JSON_BYTES if name.endswith(".json") else CARD_BYTES)
        for _ in walk(folder, (), folder, outside):
            pass
        if is_saved(folder):
            _check_saved(folder, outside)
        else:
            _check_card(folder, outside)
    except ValueError as error:
        raise LayoutError(str(error)) from None


def check_files(files: Iterable[str], folder: Path, outside: Sequence[str]) -> None:
    """Raises LayoutError, or OSError, for a data file that leads out of a folder, or is no regular file."""
    for path in map(Path, files):
        try:
            check_regular(check_inside(path, folder, outside))
        except ValueError as error:
            raise LayoutError(str(error)) from None


def check_contents(splits: dict[str, list[str]], format: str) -> None:
    """Raises LayoutError for data files of kinds that are not read from a folder, or that would fill the memory.

    `format` is that in which `datasets` reads all of them, whatever their names end in.
    """
    for path in (Path(file) for files in splits.values() for file in files):
        suffix = path.suffix.lower()
        if suffix not in KINDS:
            raise LayoutError(
                f"{shown(path)}: base.dataset_name reads {', '.join(KINDS)} files from a folder; unpack or convert it, "
                "or read .tar files with base.streaming=true"
            )
        try:
            for name in {format, suffix[1:]} & CHECKS.keys():
                CHECKS[name](path)
        except ValueError as error:
            raise LayoutError(f"{shown(path)}: {shown(error)}") from None


def _check_text(path: Path) -> None:
    if (size := path.stat().st_size) > METADATA_BYTES:
        raise InputError(f"has {size:,} bytes, and at most {METADATA_BYTES:,} are read")


CHECKS = {"arrow": check_plain, "parquet": check_unpacked, **dict.fromkeys(("csv", "json", "jsonl"), _check_text)}


def _check_saved(folder: Path, outside: Sequence[str]) -> None:
    places = [folder]
    if (folder / SPLITS).exists():
        names = _member(read_json(folder / SPLITS, JSON_BYTES), "splits", folder / SPLITS)
        places = [check_inside(folder / name, folder, outside) for name in names]
    for place in places:
        state = read_json(check_inside(place / STATE, folder, outside), JSON_BYTES)
        read_json(check_inside(place / INFO, folder, outside), JSON_BYTES)
        files = _member(state, "_data_files", place / STATE)
        names = [file.get("filename") if isinstance(file, dict) else None for file in files]
        if not all(isinstance(name, str) for name in names):
            raise InputError(f"{shown(place / STATE)}: its _data_files must each have a filename; save the data again")
        paths = [check_regular(check_inside(place / name, folder, outside)) for name in names]
        check_contents({"": [str(path) for path in paths]}, "arrow")


def _member(found: Any, key: str, path: Path) -> list[Any]:
    value = found.get(key) if isinstance(found, dict) else None
    if not isinstance(value, list) or (key == "splits" and not all(isinstance(name, str) for name in value)):
        raise InputError(f"{shown(path)}: has no list of {key}; save the data again")
    return value


def _check_card(folder: Path, outside: Sequence[str]) -> None:
    """Patterns are looked at before `datasets` searches for what they match: `/**` would search the whole disk."""
    for name in CARDS[:2]:
        card = _read_card(folder / name) if (folder / name).exists() else None
        configs = card.get("configs") if isinstance(card, dict) else None
        for config in configs if isinstance(configs, list) else ():
            if isinstance(config, dict):
                _check_config(config, folder, outside)


def _read_card(path: Path) -> Any:
    import yaml
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".md":
            block = REGEX_YAML_BLOCK.search(text)
            text = block.group(2) if block else ""
        depth = 0
        for event in yaml.parse(text):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > DEPTH:  # ten aliases can stand for a billion texts
                raise InputError(f"it has aliases (*name), or is nested more than {DEPTH} deep")
        return yaml.safe_load(text)
    except Exception as error:  # YAML has many
        raise InputError(f"{shown(path)}: its settings cannot be read ({shown(error)}); mend or remove it") from None


def _check_config(config: dict[Any, Any], folder: Path, outside: Sequence[str]) -> None:
    if others := [str(option) for option in config if option not in OPTIONS]:
        raise InputError(
            f"the card of {shown(folder)} has the option {shown(others[0])}, which is not read; it may have "
            f"{', '.join(OPTIONS)}"
        )
    base = folder / str(config.get("data_dir") or "")
    for pattern in (str(base), *_texts(config.get("data_files"))):
        if "://" in pattern or "::" in pattern or not is_inside(base / pattern, (folder, *outside)):
            raise InputError(
                f"the card of {shown(folder)} names {shown(repr(pattern))}, which leads out of the folder; name files "
                "in it, or add the folder that it leads to to base.allow_outside"
            )
        if max(name.count("*") for name in pattern.split("/")) > STARS:
            raise InputError(
                f"the card of {shown(folder)} names {shown(repr(pattern))}; give at most {STARS} stars in a name"
            )


def _texts(value: Any) -> Iterator[str]:
    """Every text in lists and dicts."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _texts(each)
