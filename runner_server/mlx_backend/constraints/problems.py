"""Errors of llguidance as messages that name the place in a constraint."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

_MAX_CHARS = 300
_MAX_TRIALS = 200
"""Most parts of a schema that are compiled to find the one at fault."""

_SOURCE = re.compile(r"^ *\d+ \| ", re.MULTILINE)
"""A line of the grammar, which llguidance shows at the end of an error."""

_SCHEMA = "failed to compile JSON schema: "
_LINE = re.compile(r"^(?:at )?(\d+)\((\d+)\): ")
_REGEX = re.compile(r"regex parse error:\n {4}[^\n]*\n {4}( *)\^+\nerror: ([^\n]*)")
_NO_VALUE = "Unsatisfiable schema: "
_UNIMPLEMENTED = re.compile(r"Unimplemented keys: \[(.*)\]")

_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_SINGLE = ("items", "additionalProperties", "not", "if", "then", "else", "contains")


def lark_problem(error: str) -> str:
    """Return the problem of a Lark grammar, with line and column."""
    text = _LINE.sub(r"at line \1, column \2: ", error)
    return _shortened(_SOURCE.split(text)[0])


def plain_problem(error: str) -> str:
    """Return the problem of a constraint whose grammar the caller has not written."""
    text = _SOURCE.split(_LINE.sub("", error))[0]
    if found := _REGEX.search(text):
        return f"{found[2]} at character {len(found[1]) + 1}"
    return _shortened(text)


def schema_problem(schema: Any, error: str, check: Callable[[Any], str]) -> str:
    """Return the problem of a JSON schema, with the smallest part that has the same problem.

    Args:
        schema: The schema.
        error: The error of the whole schema.
        check: Compiles a schema; returns the error, empty if there is none.
    """
    reason = _schema_reason(error)
    place, trials, parts = "#", 0, _parts(schema)
    shared = {key: schema[key] for key in ("$defs", "definitions") if _has(schema, key)}
    while (found := next(parts, None)) and trials < _MAX_TRIALS:
        trials += 1
        path, inner = found
        whole = {**shared, **inner} if isinstance(inner, dict) else inner
        why = _schema_reason(check(whole))
        if why == reason or (why.startswith(_NO_VALUE) and reason.startswith(_NO_VALUE)):
            place, reason, parts = f"{place}/{path}", why, _parts(inner)
    return f"at {place}: {reason}"


def _schema_reason(error: str) -> str:
    problem = plain_problem(error).removeprefix(_SCHEMA).removeprefix('failed to parse "%json": ')
    problem = problem.partition(" while processing ")[0]
    if problem.startswith("oneOf "):
        return "not supported: oneOf with parts that may overlap, use anyOf"
    if found := _UNIMPLEMENTED.search(problem):
        return f"not supported: {found[1].replace(chr(34), '')}"
    return problem


def _has(schema: Any, key: str) -> bool:
    return isinstance(schema, dict) and isinstance(schema.get(key), dict)


def _parts(schema: Any) -> Iterator[tuple[str, Any]]:
    """Yield the schemas directly inside a schema, each with its path."""
    if not isinstance(schema, dict):
        return
    for key in _MAPS:
        if _has(schema, key):
            yield from ((f"{key}/{_escaped(name)}", part) for name, part in schema[key].items())
    for key in _LISTS:
        if isinstance(schema.get(key), list):
            yield from ((f"{key}/{index}", part) for index, part in enumerate(schema[key]))
    yield from ((key, schema[key]) for key in _SINGLE if _has(schema, key))


def _escaped(name: str) -> str:
    """Escape a name for a JSON pointer (RFC 6901)."""
    return name.replace("~", "~0").replace("/", "~1")


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _MAX_CHARS else f"{text[: _MAX_CHARS - 3]}..."
