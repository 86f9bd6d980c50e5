"""JSON schemas of many kinds, made by code: supported and unsupported ones."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

Schema = dict[str, Any]

_WORDS = ("name", "größe", "日付", "kind of", 'say "hi"', "a/b", "", "id", "x-1", "emoji 😀")
_FORMATS = ("date", "time", "date-time", "email", "ipv4", "ipv6", "uuid", "hostname", "duration")
_PATTERNS = (
    "^[a-z]{3,5}$",
    "^(yes|no)$",
    "^[A-Z][a-z]{1,8}( [A-Z][a-z]{1,8})?$",
    r"^\d{3}-\d{4}$",
    "^[0-9a-f]{8}$",
    "^é{1,3}$",
    "x{2}",
)


def _string(draw: random.Random) -> Schema:
    kind = draw.randrange(4)
    if kind == 0:
        low = draw.randrange(4)
        return {"type": "string", "minLength": low, "maxLength": low + draw.randrange(6)}
    if kind == 1:
        return {"type": "string", "pattern": draw.choice(_PATTERNS)}
    if kind == 2:
        return {"type": "string", "format": draw.choice(_FORMATS)}
    return {"type": "string", "maxLength": 12}


def _number(draw: random.Random) -> Schema:
    low = draw.randrange(-200, 200)
    high = low + draw.randrange(1, 300)
    kind = draw.randrange(5)
    if kind == 0:
        return {"type": "integer", "minimum": low, "maximum": high}
    if kind == 1:
        return {"type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": high + 2}
    if kind == 2:
        return {"type": "number", "minimum": low / 4, "maximum": high / 4}
    if kind == 3:
        return {"type": "integer", "minimum": 0, "maximum": 500, "multipleOf": 5}
    return {"type": "number", "exclusiveMinimum": 0, "maximum": 1}


def _enum(draw: random.Random) -> Schema:
    values = [*draw.sample(_WORDS, 3), draw.randrange(10), None, True, 1.5, [1, "a"], {"k": 0}]
    kind = draw.randrange(2)
    return {"enum": values[: draw.randrange(1, 9)]} if kind else {"const": draw.choice(values)}


def _plain(draw: random.Random) -> Schema:
    return {"type": draw.choice(["null", "boolean", ["boolean", "null"]])}


def _array(draw: random.Random, depth: int) -> Schema:
    low = draw.randrange(3)
    sizes = {"minItems": low, "maxItems": low + draw.randrange(3)}
    if draw.randrange(3):
        return {"type": "array", "items": _any(draw, depth - 1), **sizes}
    first = [_any(draw, depth - 1) for _ in range(draw.randrange(1, 3))]
    return {"type": "array", "prefixItems": first, "items": False, "minItems": len(first)}


def _object(draw: random.Random, depth: int) -> Schema:
    names = draw.sample(_WORDS, draw.randrange(1, 5))
    schema: Schema = {
        "type": "object",
        "properties": {name: _any(draw, depth - 1) for name in names},
        "required": [name for name in names if draw.randrange(2)],
        "additionalProperties": False,
    }
    if draw.randrange(4) == 0:
        schema["additionalProperties"] = _any(draw, 0)
        schema["maxProperties"] = len(names) + 1
        schema["required"] = names
    return schema


def _map(draw: random.Random, depth: int) -> Schema:
    return {
        "type": "object",
        "patternProperties": {"^k[0-9]$": _any(draw, depth - 1)},
        "additionalProperties": False,
        "maxProperties": 2,
    }


def _union(draw: random.Random, depth: int) -> Schema:
    if draw.randrange(2):
        return {"anyOf": [_any(draw, depth - 1) for _ in range(2)]}
    disjoint = [{"type": "integer", "minimum": 0, "maximum": 9}, {"type": "boolean"}]
    return {"oneOf": disjoint}


def _intersection(draw: random.Random, _depth: int) -> Schema:
    low = draw.randrange(10)
    return {
        "allOf": [
            {"type": "integer", "minimum": low, "maximum": low + 50},
            {"maximum": low + draw.randrange(40)},
        ]
    }


_LEAVES: tuple[Callable[[random.Random], Schema], ...] = (_string, _number, _enum, _plain)
_NESTED: tuple[Callable[[random.Random, int], Schema], ...] = (
    *(_array, _object, _map, _union, _intersection),
)


def _any(draw: random.Random, depth: int) -> Schema:
    if depth <= 0 or draw.randrange(3) == 0:
        return draw.choice(_LEAVES)(draw)
    return draw.choice(_NESTED)(draw, depth)


def _with_references(draw: random.Random) -> Schema:
    """Return a schema with a definition used twice, and a recursive list."""
    return {
        "$defs": {
            "one": _any(draw, 1),
            "list": {
                "type": "object",
                "properties": {
                    "value": {"$ref": "#/$defs/one"},
                    "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/list"}]},
                },
                "required": ["value"],
                "additionalProperties": False,
            },
        },
        "type": "object",
        "properties": {"head": {"$ref": "#/$defs/list"}, "own": {"$ref": "#/$defs/one"}},
        "required": ["own"],
        "additionalProperties": False,
    }


def schemas(count: int) -> Iterator[Schema]:
    """Yield supported schemas, the same in every run."""
    draw = random.Random(15)  # noqa: S311 - reproducible
    roots: tuple[Callable[[random.Random, int], Schema], ...] = (_object, _array, _union, _map)
    for number in range(count):
        if number % 8 == 7:
            yield _with_references(draw)
        elif number % 8 == 6:
            yield draw.choice(_LEAVES)(draw)
        else:
            yield draw.choice(roots)(draw, 1 + number % 3)


UNSUPPORTED: dict[str, Schema] = {
    "not": {"not": {"type": "string"}},
    "if": {"if": {"type": "string"}, "then": {"maxLength": 1}},
    "uniqueItems": {"type": "array", "uniqueItems": True},
    "contains": {"type": "array", "contains": {"type": "null"}},
    "dependentRequired": {"type": "object", "dependentRequired": {"a": ["b"]}},
    "propertyNames": {"type": "object", "propertyNames": {"pattern": "^a"}},
    "unevaluatedProperties": {"type": "object", "unevaluatedProperties": False},
    "oneOf": {"oneOf": [{"type": "integer"}, {"type": "number"}]},
    "frob": {"type": "string", "format": "frob"},
    "look-around": {"type": "string", "pattern": "(?=a)b"},
    "/$defs/none": {"$ref": "#/$defs/none"},
    "https://example.com/x": {"$ref": "https://example.com/x"},
    "minimum (5) is greater": {"type": "integer", "minimum": 5, "maximum": 3},
    "strange": {"type": "strange"},
}
"""Schemas that are refused, by a part of the reason."""


def wrapped(schema: Schema) -> Iterator[tuple[Schema, str]]:
    """Yield a schema inside others, each with its place as a JSON pointer."""
    yield schema, "#"
    inside = {"type": "object", "properties": {"a": {"type": "null"}, "b/c": schema}}
    yield {**inside, "required": ["b/c"]}, "#/properties/b~1c"
    yield {"type": "array", "items": schema, "minItems": 1}, "#/items"
    first = {"type": "array", "prefixItems": [schema], "minItems": 1}
    yield {"allOf": [{"type": "array"}, first]}, "#/allOf/1/prefixItems/0"
