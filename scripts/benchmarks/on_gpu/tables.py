"""Writes what the sections found as Markdown, for docs/gpu.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def document(found: Mapping[str, dict[str, Any]], titles: Mapping[str, str]) -> str:
    """A heading, the machine and a table for each section."""
    parts = []
    for name, result in found.items():
        machine = f"{result['card']}, driver {result['driver']}, CUDA {result['cuda']}, {result['cores']} cores"
        versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
        parts += [f"## {titles[name]}", f"`{result['command']}`, {result['date']}: {machine}, {versions}."]
        parts.append(table(result["rows"]))
    return "\n\n".join(parts) + "\n"


def table(rows: list[dict[str, Any]]) -> str:
    """A column for each name that a row has, in the order of their first use; notes come last."""
    names = list(dict.fromkeys(name for row in rows for name in row if name != "note"))
    names += ["note"] if any("note" in row for row in rows) else []
    lines = [[name.replace("_", " ") for name in names], ["---"] * len(names)]
    lines += [[shown(row.get(name)) for name in names] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value).replace("|", "/").replace("\n", " ")
