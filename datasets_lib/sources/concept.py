"""The tables of `train_data_dir` as a list: what each says of its folder."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from datasets_lib.checks import LARGEST_REPEATS, nearest

OF_TRAINING = ("trigger_word", "repeats", "class_name")  # which pictures of the class do not have


@dataclass(frozen=True, kw_only=True)
class Concept:
    """One folder of the list."""

    path: str
    caption: str | None = None  # of images without a text of their own
    trigger_word: str | None = None  # in front of every caption
    repeats: int = 1  # how often each image comes in an epoch
    class_name: str | None = None  # the label of all images
    regularization: bool = False  # images of the class, for prior preservation


KINDS: dict[str, tuple[type, ...]] = {
    "path": (str,), "caption": (str, type(None)), "trigger_word": (str, type(None)), "repeats": (int,),
    "class_name": (str, type(None)), "regularization": (bool,),
}  # fmt: skip


def problems(tables: list[Mapping[str, Any]]) -> Iterator[str]:
    """Yields what is wrong with the list, without looking at the folders."""
    for number, table in enumerate(tables, 1):
        found = list(_table_problems(table))
        yield from (f"table {number} {problem}" for problem in found)
        if found:
            return
    concepts = [Concept(**table) for table in tables]
    training = [concept for concept in concepts if not concept.regularization]
    if not training:
        yield "must have a table without regularization: true, to train on"
    if len({concept.class_name is None for concept in training}) > 1:
        yield "must have a class_name in all tables, or in none"


def _table_problems(table: Mapping[str, Any]) -> Iterator[str]:
    if "path" not in table:
        yield "has no path; give a folder of images"
    for key, value in table.items():
        if key not in KINDS:
            yield f"has the key {key!r}; it may have {', '.join(KINDS)}; did you mean {nearest(str(key), KINDS)!r}?"
            continue
        if type(value) not in KINDS[key]:
            names = " or ".join({"str": "text", "int": "an integer", "bool": "true or false"}.get(kind.__name__, "null")
                                for kind in KINDS[key])  # fmt: skip
            yield f"has {key} = {value!r}; it must be {names}"
        elif key == "path" and ("\0" in value or re.search(r"(^|/)\$[A-Za-z_{]", value)):
            yield f"has path = {value!r}; write the folder: variables of the environment are not read"
        elif isinstance(value, str) and not value.strip() and (key, value) != ("caption", ""):
            yield f"has a blank {key}; leave it out"
        elif key == "repeats" and not 1 <= value <= LARGEST_REPEATS:
            yield f"has repeats = {value}; it must be from 1 to {LARGEST_REPEATS:,}"
        elif key in OF_TRAINING and table.get("regularization"):
            yield f"has {key}, which images with regularization: true do not use; leave it out"
