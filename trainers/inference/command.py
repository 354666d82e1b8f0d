"""Argument types, checks and error handling shared by scripts, without slow imports."""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from trainers.engine.config.errors import Interrupted


def command(main: Callable[[], None]) -> Callable[[], None]:
    """Ends a script's main with an error's message and exit code 1, or after a signal with the signal's exit code."""

    @functools.wraps(main)
    def run() -> None:
        try:
            main()
        except (ValueError, OSError, SafetensorError) as error:
            sys.exit(f"error: {error}")
        except Interrupted as interruption:
            print(interruption, file=sys.stderr)
            sys.exit(interruption.code)

    return run


def positive(text: str) -> int:
    """Argument type: an integer of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}: must be at least 1")
    return number


def check_new(path: Path) -> None:
    """Raises ValueError if the path exists."""
    if path.exists():
        raise ValueError(f"{path}: exists; choose a new folder")


def keep_settings(file: Path, settings: dict[str, Any]) -> None:
    """Writes a folder's settings; ValueError if the folder holds others, from an earlier call."""
    if not file.is_file():
        file.write_text(json.dumps(settings, indent=1), encoding="utf-8")
    before = json.loads(file.read_text(encoding="utf-8"))
    changed = [name for name in before | settings if before.get(name) != settings.get(name)]
    if changed:
        shown = "; ".join(f"{name}: {before.get(name)} -> {settings.get(name)}" for name in changed)
        raise ValueError(f"{file.parent}: was made with other settings ({shown}); choose a new folder")
