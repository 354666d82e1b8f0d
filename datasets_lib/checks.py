"""The check behind every "must be one of" error, and the choice of a column."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from datasets_lib.errors import InputError
from datasets_lib.foreign import shown

LARGEST_REPEATS = 100_000  # of an example in an epoch


def one_of(option: str, value: Any, allowed: Iterable, *other_forms: str) -> Any:
    """Return `value` if it is in `allowed`; else raise a ValueError that lists what is, and the nearest.

    `other_forms` are further forms that the message mentions, such as "package.module:build".
    """
    allowed = list(allowed)
    if value in allowed:
        return value
    names = [shown(choice) for choice in allowed]
    nearest = difflib.get_close_matches(shown(value), names, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    choices = ", ".join([*names, *other_forms]) or "(there are none)"
    raise InputError(f"{shown(option)} is {shown(repr(value))}; it must be one of: {choices}{hint}")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the known name most like `name`, whatever its case."""
    by_lower = {each.lower(): each for each in known}
    return by_lower[difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.0)[0]]


def find_column(option: str, wanted: str | None, columns: Iterable[str], common: Iterable[str]) -> str | None:
    """Return the column asked for, or the first with a common name, if there is one."""
    if wanted is not None:
        return one_of(option, wanted, columns)
    return next((name for name in common if name in columns), None)


def repeats_of(value: Any, place: str) -> int:
    """How often an example comes in an epoch; raises InputError for anything but a whole number from 1 on."""
    number = int(value) if isinstance(value, str) and value.strip().isdecimal() and len(value) < 10 else value
    if isinstance(number, float) and number.is_integer():
        number = int(number)
    if type(number) is not int or not 1 <= number <= LARGEST_REPEATS:
        found = shown(repr(value))
        raise InputError(
            f"{place} has the repeats {found} (base.repeats_column); give a whole number from 1 to {LARGEST_REPEATS:,}"
        )
    return number
