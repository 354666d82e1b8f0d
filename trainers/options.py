"""Sections of the configuration: annotated fields with trailing comments, ranges of numbers, rules between options."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar


@dataclass(frozen=True)
class Bounds:
    """The range allowed for a number of the configuration; `open_low` excludes the lower end."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        return above and value <= self.high

    def __str__(self) -> str:
        low, high = (str(end) if isinstance(end, int) else f"{end:.10g}" for end in (self.low, self.high))
        if self.high == math.inf:
            return f"{'above' if self.open_low else 'at least'} {low}"
        return f"in {'(' if self.open_low else '['}{low}, {high}]"


Positive = Annotated[int, Bounds(1)]
NonNegative = Annotated[int, Bounds(0)]
PositiveFloat = Annotated[float, Bounds(0, open_low=True)]
NonNegativeFloat = Annotated[float, Bounds(0)]
Seed = Annotated[int, Bounds(0, 2**64 - 1)]  # what torch's generators take
Fraction = Annotated[float, Bounds(0, 1)]


@dataclass(kw_only=True)
class Section:
    """One section of the configuration. Every field has an annotation and a trailing comment, which `--describe` shows.

    A public attribute without an annotation would silently not become an option, so defining one raises TypeError.
    """

    exclusive: ClassVar[tuple[tuple[str, ...], ...]] = ()  # alternatives: overriding one resets the others
    reset_with: ClassVar[dict[str, tuple[str, ...]]] = {}  # {option: others reset when it is overridden}
    free_on_resume: ClassVar[tuple[str, ...]] = ()  # may change on resume: training does not depend on them
    same_on_resume: ClassVar[dict[str, tuple[Any, ...]]] = {}  # {option: values that train alike}
    replaced: ClassVar[dict[str, dict[Any, tuple[str, Any]]]] = {}  # renamed options: {old: {value: (new, value)}}

    def __init_subclass__(cls) -> None:
        for name, value in vars(cls).items():
            is_code = callable(value) or isinstance(value, (property, classmethod, staticmethod))
            if not name.startswith("_") and not is_code and name not in inspect.get_annotations(cls):
                raise TypeError(
                    f"{cls.__name__}.{name} = {value!r} has no annotation; write `{name}: <type> = {value!r}`"
                )

    @classmethod
    def with_new_names(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Translates options written by an earlier version, such as those in a checkpoint."""
        kept = {name: value for name, value in values.items() if name not in cls.replaced}
        return dict(cls.replaced[name][values[name]] for name in values.keys() - kept.keys()) | kept

    def without_effect(self, options: Iterable[str], condition: str, holds: bool) -> Iterator[tuple[str, str]]:
        """Yields a problem for each option that was changed although the condition that it needs does not hold."""
        for option in options:
            if not holds and getattr(self, option) != type(self).__dataclass_fields__[option].default:
                yield option, f"has an effect with {condition} only"
