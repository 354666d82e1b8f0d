"""Requests to a text-to-image model: prompts from the config, or captions of held-out examples."""

from __future__ import annotations

from typing import Any

from trainers.base import Trainer


def prompt_requests(kept: list[dict], count: int) -> list[dict]:
    """Returns `count` numbered requests that cycle through `kept`; none if it is empty."""
    return [kept[number % len(kept)] | {"number": number} for number in range(count if kept else 0)]


def held_out_captions(validation_set: Any, count: int) -> list[str]:
    """Returns captions of at most `count` held-out examples, evenly spread."""
    chosen = Trainer.held_out_requests(validation_set, count)
    return [validation_set.get(request["example"], None)["caption"] for request in chosen]


def captions_and_labels(validation_set: Any, count: int) -> list[dict]:
    """Returns captions of the first `count` held-out examples, with their labels if they have any."""
    examples = [validation_set.get(number, None) for number in range(min(count, len(validation_set)))]
    return [{"prompt": e["caption"]} | ({"label": e["label"]} if "label" in e else {}) for e in examples]
