"""From an option's value there, typed or text of a command line, to ours; NoEqual says why there is none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


class NoEqual(Exception):
    """Why an option, or its value, is not taken over."""


def text(value: Any) -> str:
    if isinstance(value, bool | list | dict):
        raise NoEqual("must have one value")
    return str(value)


def texts(value: Any) -> list[str]:
    return [text(each) for each in value] if isinstance(value, list) else [text(value)]


def number(value: Any) -> float:
    try:
        if isinstance(value, bool):  # an option of a command line without its value
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise NoEqual("is no number") from None


def whole(value: Any) -> int:
    found = number(value)
    if found != found // 1:
        raise NoEqual("is no whole number")
    return int(found)


def flag(value: Any) -> bool:
    """A switch: on if a command line names it."""
    if not isinstance(value, bool):
        raise NoEqual("is neither true nor false")
    return value


def unset_at_zero(value: Any) -> float | None:
    return number(value) or None


def above_zero(value: Any) -> int:
    if (found := whole(value)) < 1:
        raise NoEqual("switches it off, which is the default here")
    return found


def one_less(value: Any) -> int | None:
    """A clip skip that counts the last layer as 1."""
    return whole(value) - 1 or None


def words(value: Any) -> list[str]:
    return [each.strip() for each in str(value).split(",")]


def among(choices: Mapping[str, Any], why: str) -> Callable[[Any], Any]:
    """Makes a reader of a word; `why` follows the list of words that have an equal."""

    def read(value: Any) -> Any:
        if str(value) not in choices:
            raise NoEqual(f"{why}; with an equal: {', '.join(choices)}")
        return choices[str(value)]

    return read


SCHEDULES = (
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "cosine_with_min_lr", "polynomial",
)  # fmt: skip
schedule = among({name: name for name in SCHEDULES}, "has no equal among the schedules")
loggers = among({"tensorboard": "tensorboard", "wandb": "wandb", "all": "both"}, "has no equal among the trackers")
OF_SAMPLES = {"ddpm": "ddpm", "ddim": "ddim", "euler": "euler", "k_euler": "euler", "dpmsolver++": "dpmsolver++"}
OF_SAMPLES |= {"DPMSolverMultistepScheduler": "dpmsolver++", "DDPMScheduler": "ddpm"}
sampler = among(OF_SAMPLES, "has no equal among the samplers")
INTERPOLATIONS = {name: name for name in ("nearest", "bilinear", "bicubic", "lanczos")}
interpolation = among(INTERPOLATIONS | {"linear": "bilinear", "cubic": "bicubic"}, "has no equal")
