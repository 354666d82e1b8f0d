"""A table as JSON, and as Markdown in a document between its marks."""

from __future__ import annotations

import json
import os
import platform
import re
from pathlib import Path
from typing import Any

import diffusers
import torch

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
RESULTS = ROOT / "outputs" / "benchmarks"


def write(table: str, rows: list[dict[str, Any]], command: str, document: Path, assumed: str | None = None) -> Path:
    """Writes the rows as outputs/benchmarks/TABLE.json, and puts them in the place of the document's older ones.

    What was calculated says what was `assumed` in the place of the machine.
    Raises ValueError where the document has no place for the table.
    """
    about = {"command": command} | machine()
    path = RESULTS / f"{table}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(about | {"rows": rows}, indent=1), encoding="utf-8")
    begin, end = f"<!-- {table} -->", f"<!-- end of {table} -->"
    text = document.read_text(encoding="utf-8")
    if begin not in text or end not in text:
        raise ValueError(f"{document}: has no place for the table; write {begin} and {end} where it shall be")
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    load = " ".join(map(str, about["load"]))
    machine_then = f"{about['machine']}, {about['threads']} threads, load {load} at the end"
    setting = f"`{command}`: {assumed or machine_then}, {versions}."
    new = f"{begin}\n{setting}\n\n{markdown(rows)}\n{end}"
    document.write_text(re.sub(f"{begin}.*?{end}", lambda _: new, text, flags=re.DOTALL), encoding="utf-8")
    return path


def markdown(rows: list[dict[str, Any]]) -> str:
    """A column for each name that is not a list's: single runs are in the JSON file alone."""
    names = [name for name, value in rows[0].items() if not isinstance(value, list)]
    lines = [names, ["---"] * len(names), *([_shown(row[name]) for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines).replace("_", " ")


def _shown(value: Any) -> str:
    if isinstance(value, tuple):  # the same by two ways
        return " / ".join(map(_shown, value))
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(each)}" for name, each in value.items())
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return str(value)


def machine() -> dict[str, Any]:
    """The name and load of the machine, threads and versions: what a measurement depends on beside the command."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return {
        "machine": f"{name}, {os.cpu_count()} cores",
        "load": [round(load, 1) for load in os.getloadavg()],
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
