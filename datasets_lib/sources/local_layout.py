"""Checks of a local folder in a hub data set's layout before `datasets` opens anything in it.

`datasets` follows what a README.md, a state.json or a link names to wherever it leads, other machines included.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from datasets_lib.foreign import check_regular, read_bytes, read_json, shown
from datasets_lib.images.files import check_inside, is_inside
from datasets_lib.sources.folder import EXTENSIONS, walk
from datasets_lib.sources.parquet_size import check_unpacked

CARDS = ("README.md", ".huggingface.yaml", "dataset_infos.json")  # which `datasets` reads first
CARD_BYTES = 16 << 20
SPLITS, STATE, INFO = "dataset_dict.json", "state.json", "dataset_info.json"  # written by save_to_disk
KINDS = (".arrow", ".csv", ".json", ".jsonl", ".parquet", *EXTENSIONS)


class LayoutError(ValueError):
    """A folder that is not given to `datasets`."""


def is_saved(folder: Path) -> bool:
    """Whether save_to_disk wrote the folder."""
    return any((folder / name).exists() for name in (SPLITS, STATE))


def check_layout(folder: Path, outside: Sequence[str]) -> None:
    """Raises LayoutError, or OSError, for a folder with links or names of files that lead out of it."""
    try:
        for name in CARDS:
            if (path := folder / name).exists():
                read_bytes(check_inside(path, folder, outside), CARD_BYTES)
        for _ in walk(folder, None, folder, outside):
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


def check_kinds(splits: dict[str, list[str]]) -> None:
    """Raises LayoutError for data files of kinds that are not read from a folder, or that would fill the memory."""
    for path in (Path(file) for files in splits.values() for file in files):
        if path.suffix.lower() not in KINDS:
            raise LayoutError(
                f"{shown(path)}: base.dataset_name reads {', '.join(KINDS)} files from a folder; unpack or convert it, "
                "or read .tar files with base.streaming=true"
            )
        if path.suffix.lower() == ".parquet":
            try:
                check_unpacked(path)
            except ValueError as error:
                raise LayoutError(f"{shown(path)}: {shown(error)}") from None


def _check_saved(folder: Path, outside: Sequence[str]) -> None:
    places = [folder]
    if (folder / SPLITS).exists():
        names = _member(read_json(folder / SPLITS, CARD_BYTES), "splits", folder / SPLITS)
        places = [check_inside(folder / name, folder, outside) for name in names]
    for place in places:
        state = read_json(check_inside(place / STATE, folder, outside), CARD_BYTES)
        read_json(check_inside(place / INFO, folder, outside), CARD_BYTES)
        files = _member(state, "_data_files", place / STATE)
        names = [file.get("filename") if isinstance(file, dict) else None for file in files]
        if not all(isinstance(name, str) for name in names):
            raise ValueError(f"{shown(place / STATE)}: its _data_files must each have a filename; save the data again")
        for name in names:
            check_regular(check_inside(place / name, folder, outside))


def _member(found: Any, key: str, path: Path) -> list[Any]:
    value = found.get(key) if isinstance(found, dict) else None
    if not isinstance(value, list) or (key == "splits" and not all(isinstance(name, str) for name in value)):
        raise ValueError(f"{shown(path)}: has no list of {key}; save the data again")
    return value


def _check_card(folder: Path, outside: Sequence[str]) -> None:
    """Patterns are looked at before `datasets` searches for what they match: `/**` would search the whole disk."""
    import yaml
    from huggingface_hub import DatasetCard

    cards: list[Any] = []
    try:
        if (folder / CARDS[0]).exists():
            cards.append(DatasetCard.load(folder / CARDS[0], ignore_metadata_errors=True).data.to_dict())
        if (folder / CARDS[1]).exists():
            cards.append(yaml.safe_load((folder / CARDS[1]).read_text(encoding="utf-8")))
    except Exception as error:  # YAML has many
        raise ValueError(f"{shown(folder)}: its card cannot be read ({shown(error)}); mend or remove it") from None
    for card in cards:
        configs = card.get("configs") if isinstance(card, dict) else None
        for config in configs if isinstance(configs, list) else ():
            base = folder / str(config.get("data_dir") or "") if isinstance(config, dict) else folder
            for pattern in [str(base), *_texts(config.get("data_files") if isinstance(config, dict) else None)]:
                _check_pattern(pattern, base, folder, outside)


def _texts(value: Any) -> Iterator[str]:
    """Every text in lists and dicts."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _texts(each)


def _check_pattern(pattern: str, base: Path, folder: Path, outside: Sequence[str]) -> None:
    if "://" in pattern or "::" in pattern or not is_inside(base / pattern, (folder, *outside)):
        raise ValueError(
            f"the card of {shown(folder)} names {shown(repr(pattern))}, which leads out of the folder; name files in "
            "it, or add the folder that it leads to to base.allow_outside"
        )
