"""Judges values by JSON Schemas that have the keywords which ours use, by draft-07's own words; others are an error."""

from __future__ import annotations

import json
import re

TYPES = {
    "null": lambda value: value is None,
    "boolean": lambda value: isinstance(value, bool),
    "string": lambda value: isinstance(value, str),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "integer": lambda value: TYPES["number"](value) and value == int(value),
}
ANNOTATIONS = {"$schema", "title", "description", "default", "definitions"}


def is_valid(value, schema, root=None):
    return not problems(value, schema, root)


def problems(value, schema, root=None, place=""):
    """Returns "place: keyword" of everything that a schema forbids in a value."""
    root = schema if root is None else root
    if "$ref" in schema:  # its siblings are ignored
        [name] = re.fullmatch(r"#/definitions/(\w+)", schema["$ref"]).groups()
        return problems(value, root["definitions"][name], root, place)
    found = []
    for keyword, wanted in schema.items():
        if keyword not in ANNOTATIONS:
            found += CHECKS[keyword](value, wanted, schema, root, place)
    return found


def _said(keyword, holds, place):
    return [] if holds else [f"{place}: {keyword}"]


def _types(value, wanted, schema, root, place):
    return _said("type", any(TYPES[name](value) for name in ([wanted] if isinstance(wanted, str) else wanted)), place)


def _enum(value, wanted, schema, root, place):
    same = [each for each in wanted if each == value and isinstance(each, bool) == isinstance(value, bool)]
    return _said("enum", same, place)


def _properties(value, wanted, schema, root, place):
    known = [name for name in wanted if isinstance(value, dict) and name in value]
    return [text for name in known for text in problems(value[name], wanted[name], root, f"{place}.{name}")]


def _additional(value, wanted, schema, root, place):
    others = sorted(value.keys() - schema.get("properties", {}).keys()) if isinstance(value, dict) else []
    if wanted is False:
        return [f"{place}.{name}: additionalProperties" for name in others]
    return [text for name in others for text in problems(value[name], wanted, root, f"{place}.{name}")]


def _items(value, wanted, schema, root, place):
    return [text for item in value for text in problems(item, wanted, root, place)] if isinstance(value, list) else []


def _of_number(holds):
    def check(value, wanted, schema, root, place):
        return _said("bounds", not TYPES["number"](value) or holds(value, wanted), place)

    return check


CHECKS = {
    "type": _types,
    "enum": _enum,
    "properties": _properties,
    "additionalProperties": _additional,
    "items": _items,
    "minimum": _of_number(lambda value, low: value >= low),
    "exclusiveMinimum": _of_number(lambda value, low: value > low),
    "maximum": _of_number(lambda value, high: value <= high),
    "pattern": lambda value, wanted, schema, root, place: _said(
        "pattern", not isinstance(value, str) or re.search(wanted, value), place
    ),
    "required": lambda value, wanted, schema, root, place: _said(
        "required", not isinstance(value, dict) or set(wanted) <= set(value), place
    ),
    "anyOf": lambda value, wanted, schema, root, place: _said(
        f"anyOf {json.dumps(wanted)}", any(is_valid(value, each, root) for each in wanted), place
    ),
    "oneOf": lambda value, wanted, schema, root, place: _said(
        "oneOf", sum(is_valid(value, each, root) for each in wanted) == 1, place
    ),
}
