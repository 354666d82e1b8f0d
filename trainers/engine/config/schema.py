"""Options as a section's dataclass declares them: type checks, the nearest name, and `--describe`."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import io
import math
import tokenize
import types
import typing
from contextlib import suppress
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from trainers.options import Section

# of the types without further parts
WORDS = {type(None): "null", str: "text", bool: "true or false", int: "an integer", float: "a number"}
UNDECIDED = "CHANGE ME"  # in the place of a value, in a config that `train.py --new` wrote


class Option(NamedTuple):
    """One option of a section."""

    name: str
    kind: Any  # the resolved annotation
    default: Any
    comment: str


def options(section: type[Section]) -> dict[str, Option]:
    """Lists a section's options, base classes first; raises TypeError if a subclass lacks its @dataclass decorator."""
    kinds = typing.get_type_hints(section, include_extras=True)
    comments = {name: text for cls in reversed(section.__mro__) for name, text in _trailing_comments(cls).items()}
    fields = {field.name: field for field in dataclasses.fields(section)}
    for name, kind in kinds.items():
        if name not in fields and get_origin(kind) is not typing.ClassVar:
            raise TypeError(
                f"{section.__name__}.{name} is not a field: decorate the class with @dataclass(kw_only=True)"
            )
    return {name: Option(name, kinds[name], _default(field), comments.get(name, "")) for name, field in fields.items()}


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


@functools.cache
def _trailing_comments(cls: type) -> dict[str, str]:
    """{field: comment on the last line of its declaration}, from the source code; empty without it."""
    if not (dataclasses.is_dataclass(cls) and issubclass(cls, Section)):
        return {}
    found: dict[str, str] = {}
    field, at_start = "", True
    for token in tokenize.generate_tokens(io.StringIO(inspect.cleandoc("\n" + inspect.getsource(cls))).readline):
        if at_start and token.type == tokenize.NAME and token.string in cls.__annotations__:
            field = token.string
        if token.type == tokenize.COMMENT and field:
            comment = token.string.split("# fmt:")[0].strip("# ")
            found[field] = comment or found.get(field, "")
        if token.type == tokenize.NEWLINE:
            field = ""
        at_start = token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.NL, tokenize.COMMENT)
    return found


def coerce(value: Any, kind: Any) -> Any:
    """Converts a value to an annotation's type; raises ValueError with the allowed values if it does not fit.

    Whole floats pass as int and ints as float; YAML's bare `no`, read as False, passes for the word in an enumeration.
    """
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        for choice in args:
            with suppress(ValueError):
                return coerce(value, choice)
        _refuse(kind)
    if origin is Annotated:
        with suppress(ValueError):
            if (number := coerce(value, args[0])) in args[1]:
                return number
        _refuse(kind)
    if origin is Literal:
        word = "no" if value is False and "no" in args else value
        return word if any(type(word) is type(arg) and word == arg for arg in args) else _refuse(kind)
    if origin is list:
        return [coerce(item, args[0]) for item in value] if isinstance(value, list) else _refuse(kind)
    if origin is dict:
        return {str(k): coerce(v, args[1]) for k, v in value.items()} if isinstance(value, dict) else _refuse(kind)
    if kind is Any:
        return value
    return _scalar(value, kind)


def _scalar(value: Any, kind: type) -> Any:
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if kind is float and type(value) is int:
        return float(value)
    is_finite = not isinstance(value, float) or math.isfinite(value)
    return value if type(value) is kind and is_finite else _refuse(kind)


def _refuse(kind: Any) -> typing.NoReturn:
    raise ValueError(describe_kind(kind))


def describe_kind(kind: Any) -> str:
    """Describes the values that an annotation allows, such as "an integer of at least 1, or null"."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        choices = [describe_kind(choice) for choice in args]
        return " or ".join(choices[:-1]) + f", or {choices[-1]}"
    if origin is Annotated:
        return f"{WORDS[args[0]]} {'' if args[1].open_low or args[1].high != math.inf else 'of '}{args[1]}"
    if origin is Literal:
        return "one of " + ", ".join(str(word) for word in args)
    if origin is list:
        return f"a list, each item {describe_kind(args[0])}"
    if origin is dict:
        return "a mapping" if args[1] is Any else f"a mapping of names, each value {describe_kind(args[1])}"
    return WORDS.get(kind, "anything")
