"""Rules for options that depend on each other, as several trainers have them."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

from trainers.engine.optim.table import OPTIMIZERS
from trainers.inference.foreign_configs.readers import flag
from trainers.inference.foreign_configs.translation import Translation
from trainers.single_file.header import PICKLES

LARGE = 0.1  # no rate of AdamW


def base_model(translation: Translation, name: str = "pretrained_model_name_or_path") -> None:
    source = translation.read(name)
    if source is not None:
        remark = "is a pickle, which is not read; take it as .safetensors" if source.endswith(PICKLES) else ""
        translation.write("task.pretrained_model_name_or_path", source, name, remark=remark)


def duration(translation: Translation, epochs: str, steps: str, first: str) -> None:
    """Takes one of epochs and steps; `first` is the one that wins there if both are given."""
    second = steps if first == epochs else epochs
    chosen = first if translation.given.get(first) is not None else second
    other = second if chosen == first else first
    translation.take(chosen)
    translation.leave(other, f"{chosen} is given, and wins there")
    translation.forget(other)


def optimizer(translation: Translation, known: Mapping[str, str], chosen: str, **switches: str) -> None:
    """Takes the optimizer named by `chosen`, or by one of the switches {name: optimizer}."""
    for name, ours in switches.items():
        if translation.is_on(name):
            _take_optimizer(translation, ours, name)
        elif name in translation.given:
            translation.leave(name, "is off, as here")
    if chosen in translation.given:
        _take_optimizer(translation, known.get(str(translation.given[chosen]).lower(), ""), chosen)


def _take_optimizer(translation: Translation, ours: str, name: str) -> None:
    if ours in OPTIMIZERS:
        translation.write("task.optimizer", ours, name)
    else:
        translation.leave(name, f"has no equal; adamw is used. There are {', '.join(OPTIMIZERS)}")
        translation.notes.append("adamw is not the optimizer there: its learning rate, too, must be chosen anew")
        rates = translation.entries.get("task.learning_rate")
        values = rates.value.values() if rates and isinstance(rates.value, dict) else [rates.value] if rates else []
        if any(value >= LARGE for value in values):  # of those that find their own step, where it is 1
            translation.give_back("task.learning_rate", "is of an optimizer with its own rates; the default is used")


def xformers(translation: Translation, name: str) -> None:
    """Its attention and torch's give the same, so it is asked for only where it is installed."""
    if not translation.is_on(name) or importlib.util.find_spec("xformers") is None:
        translation.leave(name, "xformers is not installed; torch's own attention is as fast")
    else:
        translation.write("base.enable_xformers_memory_efficient_attention", flag(translation.get(name)), name)
