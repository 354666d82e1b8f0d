"""Argument types, checks and error handling shared by scripts, without slow imports."""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets_lib.errors import InputError, UserError
from datasets_lib.foreign import read_json, shown, shown_lines
from trainers.engine.config.errors import Interrupted
from trainers.engine.run.files import write_text
from trainers.engine.run.output import lasting_output

SETTINGS_BYTES = 64 << 20


def command(main: Callable[[], None]) -> Callable[[], None]:
    """Ends a script's main with an error's message and exit code 1, or after a signal with the signal's exit code.

    Ctrl-C is one of these; what a script has finished by then stays.
    """

    @functools.wraps(main)
    def run() -> None:
        with lasting_output():
            try:
                main()
            except UserError as error:
                sys.exit(f"error: {shown_lines(error)}")
            except Interrupted as interruption:
                print(interruption, file=sys.stderr)
                sys.exit(interruption.code)
            except KeyboardInterrupt:
                print("\ninterrupted", file=sys.stderr)
                sys.exit(130)

    return run


def positive(text: str) -> int:
    """Argument type: an integer of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}: must be at least 1")
    return number


def not_negative(text: str) -> int:
    """Argument type: an integer of at least 0."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number}: must be at least 0")
    return number


def seed(text: str) -> int:
    """Argument type: what a generator of random numbers takes."""
    number = int(text)
    if not 0 <= number < 2**64:
        raise argparse.ArgumentTypeError(f"{number}: must be from 0 to {2**64 - 1}")
    return number


def path_argument(text: str) -> Path:
    """Argument type: a path that can be one."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty (an unset variable of the shell?)")
    try:
        os.stat(text)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:  # too long, in a locked folder, with a null byte
        raise argparse.ArgumentTypeError(f"{shown(text)}: cannot be used ({shown(error)})") from None
    return Path(text)


def check_new(path: Path) -> None:
    """Raises ValueError if the path exists."""
    if path.exists():
        raise InputError(f"{path}: exists; choose a new folder")


def keep_settings(file: Path, settings: dict[str, Any]) -> None:
    """Writes a folder's settings; ValueError if the folder holds others, from an earlier call."""
    if not file.is_file():
        write_text(file, json.dumps(settings, indent=1))
    before = read_json(file, SETTINGS_BYTES)
    if not isinstance(before, dict):
        raise InputError(f"{shown(file)}: holds no settings of an earlier call; choose a new folder")
    changed = [name for name in before | settings if before.get(name) != settings.get(name)]
    if changed:
        texts = "; ".join(f"{name}: {before.get(name)} -> {settings.get(name)}" for name in changed)
        raise InputError(f"{file.parent}: was made with other settings ({shown(texts)}); choose a new folder")
