"""Argument types and error handling shared by all scripts, without slow imports."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from trainers.engine.config.errors import Interrupted


def command(main: Callable[[], None]) -> Callable[[], None]:
    """Ends a script's main with an error's message and exit code 1, or after a signal with that of the signal."""

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
    """A number of the command line that is at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}: must be at least 1")
    return number


def check_new(path: Path) -> None:
    """ValueError for a path that holds something already."""
    if path.exists():
        raise ValueError(f"{path}: exists; choose a new folder")
