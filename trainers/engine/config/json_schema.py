"""JSON Schemas (draft-07) of config files: editors complete options, explain them, and underline what is wrong."""

from __future__ import annotations

import json
import math
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from trainers import TRAINERS
from trainers.engine.config.base_options import BaseConfig
from trainers.engine.config.config import find_trainer
from trainers.engine.config.schema import Option, options
from trainers.options import Bounds, Section

Schema = dict[str, Any]

DRAFT = "http://json-schema.org/draft-07/schema#"  # which VS Code and yaml-language-server know completely
TYPES = {type(None): "null", str: "string", bool: "boolean", int: "integer", float: "number"}
# OmegaConf replaces it by a value of any type
REFERENCE = {"type": "string", "pattern": r"^\$\{", "description": "the value of another option, such as ${base.seed}"}


def config_schema(task: str | None = None) -> Schema:
    """Describes the configs of a task, of a "package.module:Class" (whose section may have any name), or of all tasks.

    Raises ConfigError if there is no such task.
    """
    outside = task is not None and ":" in task
    trainers = {name: find_trainer(name, task if outside else None) for name in ([task] if task else TRAINERS)}
    sections = {
        name: section_schema(trainer.Config, (trainer.__doc__ or "").partition("\n")[0])
        for name, trainer in trainers.items()
    }
    properties = {
        "$schema": {"type": "string", "description": "the file that this editor checks the config with; not read"},
        "base": section_schema(BaseConfig, (BaseConfig.__doc__ or "").partition("\n")[0]),
    }
    schema: Schema = {"$schema": DRAFT, "title": f"diffloop: {task or 'all tasks'}", "type": "object"}
    schema["definitions"] = {"reference": REFERENCE}
    if outside:
        return schema | {"properties": properties, "required": ["base"], "additionalProperties": sections[str(task)]}
    schema |= {"properties": properties | sections, "additionalProperties": False, "required": ["base", *sections]}
    if task is None:  # a section per task, all of them known, so that their names are completed; one is to be there
        schema |= {"required": ["base"], "oneOf": [{"required": [name]} for name in sections]}
    return schema


def schema_text(task: str | None) -> str:
    """Returns the schema as JSON, as it stands in a file: an option a line."""
    return _lines(config_schema(task), 4)


def _lines(value: Any, depth: int, indent: str = "") -> str:
    """JSON whose objects have a member a line, down to a depth."""
    if depth == 0 or not isinstance(value, dict):
        return json.dumps(value)
    inner = indent + " "
    members = (f"{inner}{json.dumps(key)}: {_lines(each, depth - 1, inner)}" for key, each in value.items())
    return "{\n" + ",\n".join(members) + f"\n{indent}}}"


def section_schema(section: type[Section], description: str) -> Schema:
    """Describes a section, which may be empty."""
    return {
        "type": ["object", "null"],
        "description": description,
        "properties": {name: option_schema(option) for name, option in options(section).items()},
        "additionalProperties": False,
    }


def option_schema(option: Option) -> Schema:
    return value_schema(option.kind) | {"default": option.default, "description": option.comment}


def value_schema(kind: Any) -> Schema:
    """Describes the values that `coerce` converts to an annotation's type, and references to other options."""
    choices = _choices(kind)
    if any(not choice or choice == {"type": "string"} for choice in choices):  # then text of any kind fits
        return choices[0] if len(choices) == 1 else {"anyOf": choices}
    return {"anyOf": [*choices, {"$ref": "#/definitions/reference"}]}


def _choices(kind: Any) -> list[Schema]:
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return [choice for each in args for choice in _choices(each)]
    if origin is Annotated:
        return [{"type": TYPES[args[0]], **_bounds(args[1])}]
    if origin is Literal:
        return [{"enum": [*args, *([False] if "no" in args else [])]}]  # an unquoted `no` of YAML is false
    if origin is list:
        return [{"type": "array", "items": value_schema(args[0])}]
    if origin is dict:
        return [{"type": "object", "additionalProperties": value_schema(args[1])}]
    return [{"type": TYPES[kind]} if kind in TYPES else {}]


def _bounds(bounds: Bounds) -> Schema:
    low = {"exclusiveMinimum" if bounds.open_low else "minimum": bounds.low}
    return {name: limit for name, limit in (low | {"maximum": bounds.high}).items() if not math.isinf(limit)}
