"""Sections of the configuration: annotated fields with trailing comments, ranges of numbers, rules over options."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple


class Bounds(NamedTuple):
    """The range that a number of the configuration must lie in; `open_low` leaves the lower end out."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False

    def __contains__(self, value: object) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        return above and value <= self.high

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"{'above' if self.open_low else 'at least'} {self.low:.10g}"
        return f"in {'(' if self.open_low else '['}{self.low:.10g}, {self.high:.10g}]"


Positive = Annotated[int, Bounds(1)]
NonNegative = Annotated[int, Bounds(0)]
PositiveFloat = Annotated[float, Bounds(0, open_low=True)]
NonNegativeFloat = Annotated[float, Bounds(0)]
Fraction = Annotated[float, Bounds(0, 1)]


@dataclass(kw_only=True)
class Section:
    """One section of the configuration. Every field is annotated and has a trailing comment, which `--describe` shows.

    A public attribute without an annotation would silently be no option, so it is a TypeError when the class is made.
    """

    exclusive: ClassVar[tuple[tuple[str, ...], ...]] = ()  # groups of options of which an override replaces the others
    reset_with: ClassVar[dict[str, tuple[str, ...]]] = {}  # options that go when another one is overridden
    free_on_resume: ClassVar[tuple[str, ...]] = ()  # options that may change on resume: nothing trained depends on them
    replaced: ClassVar[dict[str, dict[Any, tuple[str, Any]]]] = {}  # of earlier versions: {old: {value: (new, value)}}

    def __init_subclass__(cls) -> None:
        for name, value in vars(cls).items():
            is_code = callable(value) or isinstance(value, (property, classmethod, staticmethod))
            if not name.startswith("_") and not is_code and name not in inspect.get_annotations(cls):
                raise TypeError(
                    f"{cls.__name__}.{name} = {value!r} has no annotation; write `{name}: <type> = {value!r}`"
                )

    @classmethod
    def with_new_names(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Returns options that an earlier version wrote, such as a checkpoint's, as they read now."""
        kept = {name: value for name, value in values.items() if name not in cls.replaced}
        return dict(cls.replaced[name][values[name]] for name in values.keys() - kept.keys()) | kept

    def without_effect(self, options: Iterable[str], condition: str, holds: bool) -> Iterator[tuple[str, str]]:
        """Yields those of the options that were set though the condition does not hold that gives them an effect."""
        for option in options:
            if not holds and getattr(self, option) != type(self).__dataclass_fields__[option].default:
                yield option, f"has an effect with {condition} only"
