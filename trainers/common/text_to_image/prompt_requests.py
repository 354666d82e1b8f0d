"""What to draw with a text-to-image model: prompts from the config, or captions of held-out examples."""

from __future__ import annotations

from typing import Any


def prompt_requests(kept: list[dict], count: int) -> list[dict]:
    """So many requests, numbered, that go through what is `kept` in turn; none where nothing is."""
    return [kept[number % len(kept)] | {"number": number} for number in range(count if kept else 0)]


def held_out_captions(validation_set: Any, count: int) -> list[str]:
    """Captions of at most so many held-out examples, evenly spread."""
    total = 0 if validation_set is None else len(validation_set)
    chosen = min(count, total)
    return [validation_set.get(number * total // chosen, None)["caption"] for number in range(chosen)]


def captions_and_labels(validation_set: Any, count: int) -> list[dict]:
    """The captions of the first held-out examples, and their labels where they have any."""
    examples = [validation_set.get(number, None) for number in range(min(count, len(validation_set)))]
    return [{"prompt": e["caption"]} | ({"label": e["label"]} if "label" in e else {}) for e in examples]
