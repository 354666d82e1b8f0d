"""The tests that are marked `cuda`, by pytest in a process of its own: a row for each."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from functools import partial
from typing import Any
from xml.etree import ElementTree

from scripts.benchmarks.on_gpu.section import Asked, Case
from scripts.benchmarks.runs import ROOT


def cases(asked: Asked) -> dict[str, Case]:
    return {"pytest -m cuda": partial(run, asked)}


def run(asked: Asked) -> dict[str, Any]:
    report = asked.folder / "report.xml"
    files = [
        path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "pytest.mark.cuda" in path.read_text("utf-8")
    ]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", f"--junit-xml={report}", *map(str, files)]
    seconds = max(asked.end - time.monotonic(), 1)
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=seconds)
    print(ended.stdout[-6000:], flush=True)
    suite = ElementTree.parse(report).getroot()[0].attrib
    failed = re.findall(r"^FAILED (\S+)", ended.stdout, re.MULTILINE)
    counts = {name: int(suite[name]) for name in ("tests", "failures", "errors", "skipped")}
    note = ", ".join(f"{number} {name}" for name, number in counts.items()) + "".join(f"; {name}" for name in failed)
    return {"holds": ended.returncode == 0, "note": note}
