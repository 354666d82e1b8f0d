"""Texts of options: which of them may name a file, and what no file can be called."""

from __future__ import annotations

import re

# options whose texts are shown to a network: they name no file
OF_TEXTS = re.compile("(caption|prompt|word)(?!.*_column)")
ENVIRONMENT = (
    "environment variables are not read, as a config is written to the run's folder; write the value, ~ for the "
    "home folder, or give the option on the command line, where the shell replaces them"
)
VARIABLE = re.compile(r"(^|/)\$[A-Za-z_]")  # in a path
OF_FILES = re.compile("dir|path|model|vae|weights|config|checkpoint|features|classifier|dataset|file")  # in their names
NAME_BYTES = 255


def text_problem(key: str, value: str) -> str | None:
    """Says what is wrong with a text, whatever its option: what no file can be called, and variables in a path."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return "is not UTF-8 text; type it anew"
    if OF_TEXTS.search(key):
        return None
    if VARIABLE.search(value):
        return ENVIRONMENT
    if "\0" in value:
        return "has a null byte, which no name can have; remove it"
    if OF_FILES.search(key) and any(len(name.encode()) > NAME_BYTES for name in value.split("/")):
        return f"has a name of more than {NAME_BYTES} bytes, which no file can have; shorten it"
    return None
