"""Decides which code may run that files name: a run that somebody sent must not choose what is executed here."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

from datasets_lib.foreign import shown
from trainers import TRAINERS

RUN_CONFIG = "config.yaml"  # what a run writes its configuration to; every file of this name counts as a run's


class Trust(NamedTuple):
    """Who names code beside the tables of tasks and data sets, and what the user allows."""

    source: str | None = None  # the file of a run that names code; None: the user's own configuration
    everything: bool = False  # --trust-code was given
    named: frozenset[str] = frozenset()  # "base.option=name" of the user's own command line

    @classmethod
    def of_run(cls, source: Path, trust_code: bool, overrides: Iterable[str] = ()) -> Trust:
        """The trust in a run's own files; `overrides` are words of the user's command line."""
        return cls(str(source), trust_code, frozenset(overrides))

    @classmethod
    def of_config(cls, path: Path, trust_code: bool, overrides: Iterable[str] = ()) -> Trust:
        """The trust in a configuration file: it is the user's own, unless a run wrote it."""
        return cls.of_run(path, trust_code, overrides) if path.name == RUN_CONFIG else cls(None, trust_code)

    def problem(self, option: str, name: str | None) -> str | None:
        """Says why the code that base.trainer_class or base.dataset names is not imported; None if it may be."""
        ours = TRAINERS.values() if option == "trainer_class" else [name] if ":" not in str(name) else []
        if name is None or self.source is None or name in ours or f"base.{option}={name}" in self.named:
            return None
        if self.everything:
            _say(f"--trust-code: {shown(self.source)} names the code base.{option} = {shown(name)}, which is imported")
            return None
        return (
            f"names code that is not diffloop's, in {shown(self.source)}; read it, then allow it with "
            f"--trust-code, or name it yourself: base.{option}={shown(name)}"
        )

    def program_problem(self, spec: str | None) -> str | None:
        """Says why a file that measures pictures is not run, if it is a program; None if it may be, or is none."""
        if spec is None or not Path(spec).is_file():
            return None
        if self.everything:
            _say(f"--trust-code: {shown(spec)} is a program (TorchScript), which is run")
            return None
        return (
            "is a program (TorchScript), which can do anything; if you trust whoever made it, allow it with "
            "--trust-code, or give a network's weights instead"
        )


OWN = Trust()  # in the user's own configuration, whose code is imported; programs need --trust-code


def add_trust_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust-code",
        action="store_true",
        help="import code that a run's own files name, and run TorchScript files; says which: read them first",
    )


@cache
def _say(text: str) -> None:
    """Prints a line once."""
    print(text, file=sys.stderr, flush=True)
