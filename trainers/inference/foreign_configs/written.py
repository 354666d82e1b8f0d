"""The text of a configuration that was made from another trainer's: YAML, comments and what is left out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from datasets_lib.foreign import shown
from trainers.inference.foreign_configs.translation import Cell, Entry, Left, Translation

PLAIN = re.compile(r"[A-Za-z/][\w./+-]*(\+\+)?")
WORDS = {"y", "n", "yes", "no", "true", "false", "on", "off", "null", "none", "nan", "inf"}  # of some YAML or other


def as_yaml(translation: Translation, origin: str) -> str:
    """Writes both sections in the order of `--describe`; `origin` says what they were made from."""
    lines = [
        f"# Made by scripts/import_config.py from {shown(origin)}.",
        "# Behind a line stands what its option is called there. The end lists what was left out, and why.",
    ]
    for note in translation.notes:
        lines.append(f"# NOTE: {shown(note)}")
    for section in ("base", "task"):
        lines += ["", f"{translation.task if section == 'task' else section}:"]
        found = [translation.entries.get(f"{section}.{option}") for option in translation.schema(section)]
        for entry in found:
            if entry is not None:
                lines += _entry(entry)
    if translation.left:
        lines += ["", "# Left out:", *map(_left, translation.left)]
    return "\n".join(lines) + "\n"


def _entry(entry: Entry) -> Iterator[str]:
    option = entry.here.split(".")[1]
    if isinstance(entry.value, list) and entry.value and isinstance(entry.value[0], dict):
        yield f"  {option}:{_comment(option, [], entry.remark)}"
        for table in entry.value:
            yield from _table(table)
    else:
        yield f"  {option}: {value_text(entry.value)}{_comment(option, entry.names, entry.remark)}"


def _table(table: dict[str, Cell]) -> Iterator[str]:
    for number, (key, cell) in enumerate(table.items()):
        yield f"    {'  ' if number else '- '}{key}: {value_text(cell.value)}{_comment(key, list(cell.names), '')}"


def _comment(option: str, names: list[str], remark: str) -> str:
    parts = [", ".join(map(shown, names)) if names not in ([], [option]) else "", shown(remark)]
    return "  # " + ": ".join(part for part in parts if part) if any(parts) else ""


def _left(left: Left) -> str:
    value = "" if left.value is None else f" = {shown(value_text(left.value))}"
    return f"#   {shown(left.name)}{value}: {shown(left.reason)}"


def value_text(value: Any) -> str:
    """Writes a value in one line; OmegaConf's references and YAML's words stay text."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list):
        return f"[{', '.join(map(value_text, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{value_text(key)}: {value_text(each)}" for key, each in value.items()) + "}"
    if isinstance(value, int | float):
        return repr(value)
    value = re.sub(r"://[^/@\s]*@", "://", str(value))  # a user and password
    text = re.sub(r"(\\*)\$\{", lambda found: 2 * found[1] + r"\${", str(value))
    if PLAIN.fullmatch(text) and text.lower() not in WORDS:
        return text
    return yaml.safe_dump(text, default_style='"', allow_unicode=True, width=float("inf")).strip()
