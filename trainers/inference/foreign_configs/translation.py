"""One configuration on its way to ours: what is given there, what is written here, what is left out and why."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, NamedTuple

from trainers.engine.config.base_options import BaseConfig
from trainers.engine.config.config import find_trainer
from trainers.engine.config.schema import Option, options
from trainers.inference.foreign_configs.readers import NoEqual, text

OTHER_TASK = "has no equal for this task"


class Row(NamedTuple):
    """One option of another trainer: its equal here, `base.name` or `task.name`, or none and the reason."""

    here: str = ""
    remark: str = ""  # what differs; why it is left out
    read: Callable[[Any], Any] = text
    secret: bool = False  # its value is never shown


class Cell(NamedTuple):
    """A value of a table within an option, with the names that it comes from."""

    value: Any
    names: tuple[str, ...] = ()


@dataclass
class Entry:
    """One line of our configuration."""

    here: str
    value: Any
    names: list[str]  # there, as given; none: a default of theirs
    remark: str


class Left(NamedTuple):
    """An option that is not taken over."""

    name: str
    value: Any  # None: not to be shown
    reason: str


@dataclass
class Translation:
    """Options there by full name (such as general.flip_aug), and what has become of them.

    Everything given ends up in exactly one of `entries` and `left`. A rule takes care of options that depend on each
    other; the table alone of all others.
    """

    task: str
    table: Mapping[str, Row]
    given: dict[str, Any]
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of theirs, by name, which are written if ours differ
    is_xl: bool = False
    entries: dict[str, Entry] = field(default_factory=dict)
    left: list[Left] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    done: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        for name in [name for name, value in self.given.items() if value == ""]:
            self.leave(name, "is empty")
            del self.given[name]

    def get(self, name: str) -> Any:
        """The value given, else their default, else None."""
        return self.given.get(name, self.defaults.get(name))

    def read(self, name: str) -> Any:
        """The value as the table reads it; None if there is none, or if it had to be left out."""
        if name in self.done or (value := self.get(name)) is None:
            return None
        try:
            return self.row(name).read(value)
        except NoEqual as reason:
            self.leave(name, str(reason))
            return None

    def is_on(self, name: str) -> bool:
        return self.get(name) is True

    def write(self, here: str, value: Any, *names: str, remark: str = "") -> None:
        """Sets an option of ours, from those of `names` that are given; or as a default of theirs, if none is."""
        found = [name for name in names if name in self.given and name not in self.done]
        section, option = here.split(".")
        taken = f"{option} has its value already" if here in self.entries else None
        if refused := taken if self.has(here) else OTHER_TASK:
            for name in found:
                self.leave(name, refused)
            return
        self.done |= set(found)
        if found or value != self.schema(section)[option].default:
            origin = remark if found or not names else f"default of {names[0]}{remark and f': {remark}'}"
            self.entries[here] = Entry(here, value, found, origin)

    def leave(self, name: str, reason: str) -> None:
        if name in self.given and name not in self.done:
            self.done.add(name)
            row = self.table.get(_last(name))
            shown = None if row is None or row.secret else self.given[name]
            plain = re.match(r"[\w.-]*", name)
            self.left.append(Left(plain[0] if plain else "", shown, reason))  # a value may hang on a wrong name

    def give_back(self, here: str, reason: str) -> None:
        """Leaves out what was taken over already."""
        for name in self.entries.pop(here).names:
            self.done.discard(name)
            self.leave(name, reason)

    def forget(self, *names: str) -> None:
        """Leaves defaults of theirs out of account."""
        self.defaults = {name: value for name, value in self.defaults.items() if name not in names}

    def take(self, *names: str) -> None:
        """Takes options over as the table says."""
        for name in names:
            if (value := self.read(name)) is not None or (name in self.given and name not in self.done):
                self.write(self.row(name).here, value, name)

    def finish(self) -> None:
        """Takes over, or leaves out, what no rule has touched; then writes defaults."""
        for name in [name for name in self.given if name not in self.done]:
            row = self.table.get(_last(name))
            if row is None:
                likely = get_close_matches(_last(name), self.table, n=1, cutoff=0.8)
                self.leave(name, f"unknown option{f'; did you mean {likely[0]}?' if likely else ''}")
            elif not row.here or not self.has(row.here):
                self.leave(name, row.remark if row.remark and not row.here else OTHER_TASK)
            else:
                self.take(name)
        for name in self.defaults.keys() - self.given.keys():
            if (row := self.table.get(name)) and row.here and self.has(row.here) and row.here not in self.entries:
                self.take(name)

    def row(self, name: str) -> Row:
        return self.table[_last(name)]

    def has(self, here: str) -> bool:
        section, option = here.split(".")
        return option in self.schema(section)

    def schema(self, section: str) -> dict[str, Option]:
        return _schema("base" if section == "base" else self.task)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


@functools.cache
def _schema(section: str) -> dict[str, Option]:
    return options(BaseConfig if section == "base" else find_trainer(section).Config)
