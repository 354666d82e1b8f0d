"""The command line of a training script, read from a shell script as text: nothing is ever run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterator
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from datasets_lib.errors import InputError
from datasets_lib.foreign import shown

COMMENT_LINES = re.compile(r"^[ \t]*#.*(\n|\Z)", re.MULTILINE)
CONTINUED = re.compile(r"\\\r?\n")
REDIRECTED = re.compile(r"(?<=\s)[12&]>>?(&\d|\s*\S+)")  # 2>&1
ENDS = re.compile(r"[;&|<>\n]+")
ASSIGNED = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})")
COMPUTED = ("$(", "`", "${")  # the third is left where a variable has a default, or is not set in the file
LAUNCHERS = "launch."  # in front of the options of accelerate launch


class Command(NamedTuple):
    """A training script's name without .py, and its options: True, a text or a list of texts."""

    script: str
    options: dict[str, Any]


def find_command(content: str, place: str, known: Collection[str]) -> Command:
    """Finds the one command that runs a known script; InputError for none, several or an unreadable one."""
    found = []
    others: list[str] = []
    for words in _commands(content, place):
        names = [PurePosixPath(word.replace("\\", "/")).name for word in words]
        at = next((number for number, name in enumerate(names) if name.removesuffix(".py") in known), None)
        if at is None or not names[at].endswith(".py"):
            others += [name for name in names if re.fullmatch(r"\w*train\w*\.py", name)]
            continue
        found.append((words, at, names[at].removesuffix(".py")))
    if len(found) != 1:
        what = "several training commands; keep one" if found else "no command that is understood"
        also = f" (found {shown(', '.join(others))})" if others and not found else ""
        raise InputError(f"{place}: holds {what}{also}; known scripts: {', '.join(f'{name}.py' for name in known)}")
    words, at, script = found[0]
    for word in words:
        if any(mark in word for mark in COMPUTED):
            raise InputError(
                f"{place}: {shown(word)} is computed by the shell, and nothing is run here; write what it gives"
            )
    launch = {f"{LAUNCHERS}{name}": value for name, value in _options(words[:at])}
    return Command(script, launch | dict(_options(words[at + 1 :])))


def _commands(content: str, place: str) -> Iterator[list[str]]:
    """Yields each command's words, with the variables that the file itself sets."""
    content = REDIRECTED.sub(" ", CONTINUED.sub(" ", COMMENT_LINES.sub("", content)))
    lexer = shlex.shlex(content, posix=True, punctuation_chars=";&|<>\n")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t\r", True, ""
    try:
        tokens = list(lexer)
    except ValueError as error:
        raise InputError(f"{place}: cannot be read as a command line ({error}, line {lexer.lineno})") from None
    variables: dict[str, str] = {}
    words: list[str] = []
    in_comment = False
    for token in [*tokens, "\n"]:
        if ENDS.fullmatch(token) and (not in_comment or "\n" in token):
            if words := _assign(words, variables):
                yield words
            words, in_comment = [], False
        elif in_comment or token.startswith("#"):
            in_comment = True
        else:
            words.append(_replaced(token, variables))


def _replaced(word: str, variables: dict[str, str]) -> str:
    """Puts in the variables that are known; others stay as they are."""
    return VARIABLE.sub(lambda name: variables.get(name[1] or name[2], name[0]), word)


def _assign(words: list[str], variables: dict[str, str]) -> list[str]:
    """Keeps what a command's first words assign; returns the others."""
    for number, word in enumerate(words):
        if match := ASSIGNED.fullmatch(word):
            variables[match[1]] = _replaced(match[2], variables)
        elif word not in ("export", "env"):
            return words[number:]
    return []


def _options(words: list[str]) -> Iterator[tuple[str, Any]]:
    name, values = "", list[str]()
    for word in [*words, "--"]:
        if not word.startswith("--"):
            values.append(word)
            continue
        if name:
            yield name, True if not values else values[0] if len(values) == 1 else values
        name, equals, value = word[2:].partition("=")
        values = [value] if equals else []
