"""Overrides of the command line, `section.key=value`: a text is taken as it was typed, other values as YAML."""

from __future__ import annotations

import types
from typing import Any, Union, cast, get_args, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainers.engine.config.schema import coerce, options
from trainers.engine.config.texts import OF_TEXTS
from trainers.options import Section

HASH = "\ue000"  # in the place of #, which begins a comment in YAML and is a character like others on a command line


def parse_overrides(overrides: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Reads overrides as YAML into {section: {key: value}}; also returns what is wrong with those of another form."""
    found: dict[str, Any] = {}
    problems = []
    for text in overrides:
        name, equals, typed = text.partition("=")
        *folders, key = name.split(".")
        if not (equals and folders and all(folders) and key):
            problems.append(f"{text}: an override reads section.key=value")
            continue
        place = found
        for folder in folders:
            inner = place.get(folder)
            place[folder] = inner = inner if isinstance(inner, dict) else {}
            place = inner
        place[key] = _as_yaml(typed)
    return found, problems


def _as_yaml(typed: str) -> Any:
    try:
        found = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={typed.replace('#', HASH)}"]))
        return _with_hashes(cast("dict[str, Any]", found)["value"])
    except (ValueError, yaml.YAMLError, OmegaConfBaseException):  # a text, or refused by its option's type
        return typed


def _with_hashes(value: Any) -> Any:
    if isinstance(value, dict):
        return {_with_hashes(key): _with_hashes(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_with_hashes(each) for each in value]
    return value.replace(HASH, "#") if isinstance(value, str) else value


def with_typed_texts(
    given: dict[str, Any], overrides: list[str], schemas: dict[str, type[Section]]
) -> tuple[dict[str, Any], list[str]]:
    """Replaces the values of options that take text by what was typed; also returns problems of empty values."""
    given = {section: dict(values) if isinstance(values, dict) else values for section, values in given.items()}
    problems = []
    for name, equals, typed in (text.partition("=") for text in overrides):
        section, _, key = name.partition(".")
        if not equals or section not in schemas or key not in (known := options(schemas[section])):
            continue
        kind = known[key].kind
        value = given[section][key]
        is_null = value is None and typed.lower() != "null"  # an empty text, ~
        if not typed.strip() and not (_takes_text(kind) and OF_TEXTS.search(key)):
            del given[section][key]
            null = "; write null for none" if _is_another(None, kind) else ""
            problems.append(f"{name} = : has no value (an unset variable of the shell?){null}")
        elif _takes_text(kind) and (is_null or not _is_another(value, kind)):
            given[section][key] = value if isinstance(value, str) and _is_quoted(typed) else typed
    return given, problems


def _is_quoted(typed: str) -> bool:
    """Whether a text is in quotes as a whole, as programs write it: they do not belong to it."""
    return len(typed) > 1 and typed[0] == typed[-1] and typed[0] in "\"'"


def _takes_text(kind: Any) -> bool:
    return kind is str or (get_origin(kind) in (Union, types.UnionType) and str in get_args(kind))


def _is_another(value: Any, kind: Any) -> bool:
    """Whether a value is one of the option's types other than text, such as null."""
    try:
        return not isinstance(coerce(value, kind), str)
    except ValueError:
        return False
