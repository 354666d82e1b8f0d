"""Measures speed and memory; writes a table as JSON and into its page of docs/: scripts/benchmarks/bench.py TABLE

Sides are measured in turns. Nothing else should run on the machine; its load is written next to the numbers.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

import diffusers
import torch

ROOT = Path(__file__).parents[2]

RESULTS = ROOT / "outputs" / "benchmarks"
PAGES = {  # the tables on each; a table is named after the module that measures it
    "performance": ("loop", "ablation", "peers", "data", "stream", "checkpoint", "scale"),
    "distributed": ("engines",),
    "stable_diffusion": ("lora",),
    "conditional": ("peer_quality",),
}
TABLES = {table: ROOT / "docs" / f"{page}.md" for page, tables in PAGES.items() for table in tables}


def write(table: str, rows: list[dict[str, Any]], command: str, document: Path) -> Path:
    """Writes the rows as outputs/benchmarks/TABLE.json, and in place of those in the document.

    Raises ValueError if the document has no place for the table.
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
    setting = f"`{command}`: {about['machine']}, {about['threads']} threads, load {load} at the end, {versions}."
    new = f"{begin}\n{setting}\n\n{markdown(rows)}\n{end}"
    document.write_text(re.sub(f"{begin}.*?{end}", lambda _: new, text, flags=re.DOTALL), encoding="utf-8")
    return path


def markdown(rows: list[dict[str, Any]]) -> str:
    """A column for each name except lists: single runs are in the JSON file only."""
    names = [name for name, value in rows[0].items() if not isinstance(value, list)]
    lines = [names, ["---"] * len(names), *([_shown(row[name]) for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines).replace("_", " ")


def _shown(value: Any) -> str:
    if isinstance(value, tuple):  # two sides
        return " / ".join(map(_shown, value))
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(each)}" for name, each in value.items())
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return str(value)


def machine() -> dict[str, Any]:
    """Name and load of the machine, threads and versions: what a measurement depends on besides the command."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--pairs", type=int, default=5, help="repetitions of each side")
    parser.add_argument("--steps", type=int, default=40, help="training steps that are timed, after a warm-up")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a repetition of the table `data`")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    rows = importlib.import_module(f"scripts.benchmarks.{asked.table}").rows(asked)
    command = f"scripts/benchmarks/bench.py {' '.join(sys.argv[1:])}"
    print(write(asked.table, rows, command, TABLES[asked.table]))


if __name__ == "__main__":
    main()
