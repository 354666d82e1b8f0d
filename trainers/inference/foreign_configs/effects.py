"""Leaves out what has no effect here: our own checks know, and would refuse it."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from trainers.engine.config.base_options import BaseConfig
from trainers.engine.config.config import find_trainer
from trainers.engine.config.schema import coerce
from trainers.inference.foreign_configs.translation import Translation

EFFECT = ("has an effect with", "has no effect")


def drop_without_effect(translation: Translation) -> None:
    """Moves such options from what is written to what is left out; defaults of theirs go without a word."""
    while found := [here for here in _reasons(translation) if here in translation.entries]:
        reasons = _reasons(translation)
        for here in found:
            entry = translation.entries.pop(here)
            for name in entry.names:
                translation.done.discard(name)
                translation.leave(name, f"{entry.here.rpartition('.')[2]} {reasons[here]}")


def _reasons(translation: Translation) -> dict[str, str]:
    """{"base.keep_tags": "has an effect with shuffle_tags: true only", ...}"""
    base, config = BaseConfig(**_values(translation, "base")), find_trainer(translation.task).Config
    section = config(**_values(translation, "task"))
    found: dict[str, str] = {}
    for name, problems in (("base", base.problems()), ("task", section.problems(base))):
        with suppress(TypeError, ValueError, AttributeError):  # of a value of the wrong type, which the check names
            for option, reason in problems:
                if reason.startswith(EFFECT):
                    found[f"{name}.{option}"] = reason
    return found


def _values(translation: Translation, section: str) -> dict[str, Any]:
    values = {}
    for here, entry in translation.entries.items():
        if here.startswith(f"{section}."):
            option = here.split(".")[1]
            values[option] = entry.value
            with suppress(ValueError):
                values[option] = coerce(entry.value, translation.schema(section)[option].kind)
    return values
