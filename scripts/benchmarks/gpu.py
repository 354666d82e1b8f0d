"""Proves on a GPU what is said of GPUs: scripts/benchmarks/gpu.py OUT [--minutes 7] [--sections NAME ...]

Each section is a process with a limit of time, which writes OUT/SECTION.json after each of its rows, so that a stop in
the middle loses nothing; OUT/gpu.md has the tables, for docs/gpu.md. Nothing is downloaded. `--device cpu --tiny` goes
through the same code with the smallest networks.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))  # on a machine where diffloop is not installed

from scripts.benchmarks.on_gpu.tables import document

ROOT = Path(__file__).parents[2]


class Section(NamedTuple):
    """The seconds and the title of a module of scripts/benchmarks/on_gpu that has `cases(asked)`."""

    seconds: float
    title: str
    by_default: bool = True


# In the order of what they prove; a part of diffloop with something to prove adds its own.
SECTIONS = {
    "card_tests": Section(60, "Tests that need a card"),
    "correct": Section(80, "Correct"),
    "speed": Section(150, "Speed against the limit"),
    "knobs": Section(60, "What each knob is worth"),
    "preflight": Section(70, "Truth of the dry run"),
    "learning": Section(600, "Learning", by_default=False),
}
GRACE = 5.0  # seconds after which a section that is still busy is ended


def run(options: argparse.Namespace) -> int:
    """Runs the sections one after the other and writes the tables; returns 0, or 1 if something did not hold."""
    options.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes
    chosen = options.sections or [name for name, section in SECTIONS.items() if section.by_default]
    for name in chosen:
        left = end - time.monotonic()
        seconds = left if options.sections else min(SECTIONS[name].seconds, left)
        if seconds < 1:
            print(f"{name}: not run, no time was left", flush=True)
            continue
        began = time.monotonic()
        how = run_section(name, seconds, options)
        print(f"{name}: {how} after {time.monotonic() - began:.0f} s", flush=True)
    files = {name: options.out / f"{name}.json" for name in SECTIONS}
    found = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in files.items() if path.is_file()}
    text = document(found, {name: section.title for name, section in SECTIONS.items()})
    (options.out / "gpu.md").write_text(text, encoding="utf-8")
    print(text)
    return int(any(row.get("holds") is False for rows in found.values() for row in rows["rows"]))


def run_section(name: str, seconds: float, options: argparse.Namespace) -> str:
    """Runs a section in a process group, of which nothing is left when its time is over; says how it ended."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])}
    environment |= {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": str(options.device == "cpu").lower()}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        given = [name, str(options.out), folder, str(seconds), options.device, *["--tiny"] * options.tiny]
        command = [sys.executable, "-m", "scripts.benchmarks.on_gpu.section", *given]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
        try:
            code = process.wait(seconds + GRACE)  # it looks at the clock itself between its rows
            return "done" if code == 0 else f"ended with exit code {code}"
        except subprocess.TimeoutExpired:
            return "stopped"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # children, too, which would use the card beside the next one
            process.wait()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the results")
    parser.add_argument("--minutes", type=float, default=7.0, help="for all sections together")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, help="these alone, with all of the time")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the smallest networks, a few steps")
    options = parser.parse_args(arguments)
    options.out = options.out.absolute()
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
