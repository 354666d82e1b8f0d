"""kohya's data: folders with their repeats and texts, and options that each level of the file may overrule."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from trainers.inference.foreign_configs.kohya_data_table import ALIASES, FILES_READ, ONE_FOR_ALL
from trainers.inference.foreign_configs.kohya_folders import main_folders
from trainers.inference.foreign_configs.readers import NoEqual, whole
from trainers.inference.foreign_configs.translation import Cell, Translation

OF_TABLES = ("image_dir", "num_repeats", "dataset_repeats", "class_tokens", "is_reg", "caption_prefix")
IGNORED = "is ignored there beside a dataset_config"


class Subset(NamedTuple):
    """One folder of a dataset_config, or the main file alone; prefixes of names, the nearest level first."""

    levels: tuple[str, ...]

    def find(self, given: dict[str, Any], name: str) -> str | None:
        """The full name of the option that counts for this folder."""
        names = [f"{level}{name}" for level in self.levels]
        names += [ALIASES[name]] if name in ALIASES else []
        return next((full for full in names if full in given), None)


def flattened(document: dict[str, Any]) -> tuple[dict[str, Any], list[Subset]]:
    """Turns a dataset_config into options by full name, such as datasets.1.subsets.2.image_dir, and its folders."""
    given = {f"dataset_config.{key}": value for key, value in document.items() if key not in ("general", "datasets")}
    given |= {f"general.{key}": value for key, value in document.get("general", {}).items()}
    subsets = []
    for number, dataset in enumerate(document.get("datasets", []), 1):
        level = f"datasets.{number}."
        given |= {f"{level}{key}": value for key, value in dataset.items() if key != "subsets"}
        for place, subset in enumerate(dataset.get("subsets", []), 1):
            own = f"{level}subsets.{place}."
            given |= {f"{own}{key}": value for key, value in subset.items()}
            subsets.append(Subset((own, level, "general.", "")))
    return given, subsets


def translate_data(made: Translation, subsets: list[Subset]) -> None:
    training = [subset for subset in subsets if not _is_reg(made, subset)] or [Subset(("",))]
    if subsets:
        _tables(made, subsets)
    else:
        main_folders(made)
    for name in ONE_FOR_ALL:
        _one_for_all(made, training, name)
    _resolution(made, training, _buckets(made, training))
    for full in _all(made, "caption_extension", "caption_extention"):
        is_read = made.given[full] in FILES_READ
        made.leave(full, "is read here: NAME.txt, then NAME.caption" if is_read else made.row(full).remark)
    for full in _all(made, "caption_separator"):
        made.leave(full, "is always so here" if made.given[full] == "," else made.row(full).remark)


def _is_reg(made: Translation, subset: Subset) -> bool:
    full = subset.find(made.given, "is_reg")
    return full is not None and made.given[full] is True


def _tables(made: Translation, subsets: list[Subset]) -> None:
    for name in ("train_data_dir", "reg_data_dir", "in_json"):
        made.leave(name, IGNORED)
    tables: dict[str, dict[str, Cell]] = {}
    for subset in subsets:
        path = str(made.given.get(f"{subset.levels[0]}image_dir"))
        if path not in tables:
            tables[path] = dict(_cells(made, subset))
        for full in [full for full in made.given if full.startswith(subset.levels[0])]:
            if full.rpartition(".")[2] in OF_TABLES:
                made.leave(full, "is of a folder that is in the list already, which has one resolution")
    made.write("base.train_data_dir", list(tables.values()))
    for full in _all(made, *OF_TABLES):
        made.leave(full, "is not used by any folder")


def _cells(made: Translation, subset: Subset) -> Iterator[tuple[str, Cell]]:
    """Yields the entries of a folder's table; each option is named where it is used first."""
    is_reg = _is_reg(made, subset)
    keys = {"image_dir": "path", "class_tokens": "caption", "num_repeats": "repeats", "caption_prefix": "trigger_word"}
    for name, key in keys.items():
        if (full := subset.find(made.given, name)) is None:
            continue
        value = made.given[full]
        if is_reg and key in ("repeats", "trigger_word"):
            if full.startswith(subset.levels[0]):
                made.leave(full, "examples are paired with pictures of the class, which have neither repeats nor it")
            continue
        if key == "trigger_word":
            value = str(value).strip(" ,")
        yield key, Cell(value, _first_use(made, full))
    if is_reg:
        yield "regularization", Cell(True, _first_use(made, str(subset.find(made.given, "is_reg"))))
    elif (full := subset.find(made.given, "is_reg")) is not None:
        made.leave(full, "is off, as here")


def _first_use(made: Translation, full: str) -> tuple[str, ...]:
    names = (full,) if full not in made.done else ()
    made.done.add(full)
    return names


def _one_for_all(made: Translation, training: list[Subset], name: str) -> None:
    """Takes an option that is one for the whole run here; the first folder's value counts."""
    row = made.table[name]
    used = [full for subset in training if (full := subset.find(made.given, name)) is not None]
    others = {name, ALIASES.get(name, name)}
    all_given = _all(made, *others)
    try:
        value = row.read(made.given[used[0]]) if used else None
    except NoEqual as reason:
        for full in all_given:
            made.leave(full, str(reason))
        return
    if used:
        same = [full for full in all_given if made.given[full] == made.given[used[0]]]
        made.write(row.here, value, *same)
    for full in all_given:
        made.leave(full, f"is one for the whole run here, and {used[0]} was taken" if used else "is of the class only")


def _buckets(made: Translation, training: list[Subset]) -> bool:
    """Takes enable_bucket over, and says whether there are buckets; with pictures of the class there are none."""
    full = training[0].find(made.given, "enable_bucket")
    is_on = full is not None and made.given[full] is True
    tables = _list_of(made.entries.get("base.train_data_dir"))
    with_class = "base.class_data_dir" in made.entries or any("regularization" in table for table in tables)
    if is_on and with_class:
        for name in _all(made, "enable_bucket"):
            made.leave(name, "does not work here with pictures of the class, which would differ in shape")
    else:
        _one_for_all(made, training, "enable_bucket")
    return is_on and not with_class


def _resolution(made: Translation, training: list[Subset], buckets: bool) -> None:
    chosen = training[0].find(made.given, "resolution")
    if chosen is None:
        made.write("base.resolution", 1024 if made.is_xl else 512, remark="is not given, and must be there")
        return
    names = _all(made, "resolution")
    try:
        width, height = _sides(made.given[chosen])
    except NoEqual as reason:
        for name in names:
            made.leave(name, str(reason))
        return
    side = width if width == height else math.isqrt(width * height) if buckets else min(width, height)
    same = [name for name in names if made.given[name] == made.given[chosen]]
    made.write("base.resolution", side, *same, remark="" if width == height else f"{width} x {height} there")
    if buckets and width != height:
        made.write("base.bucket_max_pixels", width * height, remark=f"{width} x {height}")
    for name in names:
        made.leave(name, f"is one for the whole run here, and {chosen} was taken")


def _all(made: Translation, *names: str) -> list[str]:
    """The full names, of any level."""
    return [full for full in made.given if full.rpartition(".")[2] in names]


def _list_of(entry: Any) -> list[Any]:
    return entry.value if entry is not None and isinstance(entry.value, list) else []


def _sides(value: Any) -> tuple[int, int]:
    """Width and height of 512, "512", "768,512" or [768, 512]."""
    sides = value if isinstance(value, list) else str(value).split(",")
    if len(sides) not in (1, 2):
        raise NoEqual("is neither a side nor width and height")
    return whole(sides[0]), whole(sides[-1])
