"""Runs one section of gpu.py in this process, and writes its rows as they are found."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from scripts.benchmarks.on_gpu.machine import about, clean_up
from scripts.benchmarks.runs import ROOT

Case = Callable[[], dict[str, Any]]  # a row's columns; "holds": whether what it checks is true


class Asked(NamedTuple):
    """A section's place, device, size and end."""

    folder: Path  # for its runs
    device: str
    tiny: bool
    end: float  # by time.monotonic()

    def run_folder(self, name: str) -> str:
        """The place of a run, named after its row."""
        return str(self.folder / "".join(letter if letter.isalnum() else "-" for letter in name))


class Skip(Exception):
    """A row that cannot be measured here, with the reason."""


def run(name: str, asked: Asked, out: Path) -> None:
    """Calls the section's cases in their order until its time is over; a case that fails becomes a row that says so."""
    module = f"scripts.benchmarks.on_gpu.{name}"
    rows: list[dict[str, Any]] = []
    found: dict[str, Case] = {}
    failure = outcome(lambda: found.update(importlib.import_module(module).cases(asked)) or {})
    if failure:
        found = {"the section": lambda: failure}
    for case, measure in found.items():
        began = time.monotonic()
        row: dict[str, Any] = {"case": case}
        if began > asked.end:
            row["note"] = "not run: no time was left"
        else:
            write(name, asked, out, [*rows, row | {"note": "stopped: its time was over"}])  # which is read if it is
            row |= outcome(measure) | {"seconds": round(time.monotonic() - began, 1)}
        clean_up()
        rows.append(row)
        print(f"  {name}: {row}", flush=True)
        write(name, asked, out, rows)


def write(name: str, asked: Asked, out: Path, rows: list[dict[str, Any]]) -> None:
    part = out / f".{name}.part"
    part.write_text(json.dumps(about(name, asked.tiny) | {"rows": rows}, indent=1), encoding="utf-8")
    part.rename(out / f"{name}.json")


def outcome(measure: Case) -> dict[str, Any]:
    try:
        return measure()
    except Skip as reason:
        return {"note": f"skipped: {reason}"}
    except Exception as error:
        traceback.print_exc()
        return {"holds": False, "note": f"{type(error).__name__}: {str(error)[:300]}"}


def if_it_fits(measure: Case) -> dict[str, Any]:
    """Calls a case of a realistic size, which a smaller card may not hold."""
    try:
        return measure()
    except torch.OutOfMemoryError:
        raise Skip("it does not fit into the card's memory") from None


def called(asked: Asked, *arguments: Any) -> str:
    """Returns what a script printed, in a process that ends with the section's time. RuntimeError if it fails."""
    command = [sys.executable, *map(str, arguments)]
    left = max(asked.end - time.monotonic(), 1.0)
    try:
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=left)
    except subprocess.TimeoutExpired:
        raise Skip(f"{arguments[0]} was stopped, as the section's time was over") from None
    if ended.returncode:
        raise RuntimeError(f"{arguments[0]} ended with {ended.returncode}: {(ended.stdout + ended.stderr)[-300:]}")
    return ended.stdout


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("section")
    parser.add_argument("out", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("seconds", type=float)
    parser.add_argument("device")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before the first product, for runs that ask for it
    run(options.section, Asked(options.folder, options.device, options.tiny, end), options.out)


if __name__ == "__main__":
    main()
