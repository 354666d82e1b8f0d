"""The one check behind every "must be one of" error."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


def one_of(option: str, value: Any, allowed: Iterable, *other_forms: str) -> Any:
    """Return `value` if it is in `allowed`; else raise a ValueError that lists what is, and the nearest.

    `other_forms` are further forms that the message mentions, such as "package.module:build".
    """
    allowed = list(allowed)
    if value in allowed:
        return value
    names = [str(choice) for choice in allowed]
    nearest = difflib.get_close_matches(str(value), names, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    choices = ", ".join([*names, *other_forms]) or "(there are none)"
    raise ValueError(f"{option} is {value!r}; it must be one of: {choices}{hint}")
