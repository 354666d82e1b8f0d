"""The repository's root, and the tiny configs in it."""

from __future__ import annotations

from pathlib import Path

import tiny_models

ROOT = Path(__file__).parents[2]


def tiny(task):
    """configs/tests/<task>.json, with the base model that it names made."""
    path = ROOT / "configs" / "tests" / f"{task}.json"
    if "outputs/tests/sd1" in path.read_text():
        tiny_models.model("sd1")
    return path
