"""A table as JSON, and as Markdown in a document between its marks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from scripts.benchmarks.runs import machine

DOCUMENT = Path(__file__).parents[2] / "docs" / "performance.md"
DISTRIBUTED = DOCUMENT.with_name("distributed.md")
RESULTS = Path(__file__).parents[2] / "outputs" / "benchmarks"


def write(
    table: str, rows: list[dict[str, Any]], command: str, document: Path = DOCUMENT, assumed: str | None = None
) -> Path:
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
