"""Reads the report on a data set."""

from __future__ import annotations


def section(lines, name):
    """The lines of one data set of the report: {title: [texts]}."""
    start = lines.index(f"{name}:") + 1
    found, title = {}, ""
    for line in lines[start:]:
        if not line.startswith("  "):
            break
        title = line[2:17].strip() or title
        found.setdefault(title, []).append(line[17:])
    return found
