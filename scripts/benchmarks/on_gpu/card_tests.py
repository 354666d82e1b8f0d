"""The tests that are marked `cuda`, by pytest in a process of its own; those that did not pass are named."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from typing import Any

from scripts.benchmarks.on_gpu.section import Asked, Case
from scripts.benchmarks.runs import ROOT

MARK = "pytest.mark.cuda"


def cases(asked: Asked) -> dict[str, Case]:
    return {"pytest -m cuda": partial(run, asked)}


def run(asked: Asked) -> dict[str, Any]:
    """Reads what pytest says of each test as it ends, so that a stop loses only what was not run."""
    files = [path for path in (ROOT / "tests").rglob("test_*.py") if MARK in path.read_text(encoding="utf-8")]
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-m", "cuda", *map(str, files)]
    left = max(asked.end - time.monotonic(), 1.0)
    try:
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, check=False, timeout=left)
        printed, passed, how = ended.stdout, ended.returncode == 0, ""
    except subprocess.TimeoutExpired as stopped:
        printed, passed, how = stopped.stdout or b"", False, "; stopped: its time was over"
    text = printed.decode(errors="replace")
    print(text[-8000:], flush=True)
    results = re.findall(r"^\S*::(\S+) (PASSED|FAILED|ERROR|SKIPPED)", text, re.MULTILINE)
    counts = Counter(result.lower() for _, result in results)
    bad = [name for name, result in results if result in ("FAILED", "ERROR")]
    note = ", ".join(f"{number} {result}" for result, number in counts.items()) + how
    return {"holds": passed, "note": note + "".join(f"; {name}" for name in bad)}
