"""Constraints as texts in llguidance's variant of Lark's syntax."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NoReturn

from runner_common.contract import MAX_SCHEMA_DEPTH
from runner_server.engine.types import Constraint
from runner_server.errors import InvalidField

WHITESPACE = r"[ \t]{1,20}|\r?\n[ \t]{0,20}"
"""White space between two parts of a JSON value. Unbounded, generation could loop in it."""

MODEL_SPLITS = '\n%llguidance {"no_forcing": true}\n'
"""Leaves it to the model how text is split into tokens, also where the grammar allows one text
only. Otherwise llguidance would tokenize that text, with the tokenizer called from its threads."""

SCHEMA_FIELD = "constraint.json_schema"
"""The field of a request's own schema."""

_SETTINGS_KEY = "x-guidance"
"""Key of a schema with settings of llguidance, one of which makes it ignore unknown keywords."""

_REFUSED_ATTRIBUTE = re.compile(
    r"^\s*[?!]?[A-Za-z_]\w*\s*\[[^\]]*?\b(stop|temperature)\s*=", re.MULTILINE
)
"""An attribute of a Lark rule which has no effect here (``temperature``), or hides text from the
grammar that is part of the output (``stop``)."""


def field_of(constraint: Constraint) -> str:
    """Return the field of a request that holds a constraint."""
    return f"constraint.{constraint.kind}"


def grammar_text(constraint: Constraint) -> str:
    """Return the grammar of a constraint.

    Raises:
        InvalidField: The constraint is not JSON, is nested too deep, or has a setting that is
            refused. llguidance checks everything else.
    """
    match constraint.kind, constraint.texts:
        case "json_schema", (text,):
            return schema_grammar(read_schema(text))
        case "json_object", ():
            return schema_grammar({"type": "object"})
        case "regex", (pattern,):
            return f"start: /{_in_slashes(pattern)}/{MODEL_SPLITS}"
        case "choice", texts:
            return "start: " + " | ".join(map(json.dumps, texts)) + MODEL_SPLITS
        case "lark", (text,):
            _check_lark(text)
            return text + MODEL_SPLITS
        case _:
            raise ValueError(f"not a constraint: {constraint.kind}")


def read_schema(text: str, field: str = SCHEMA_FIELD) -> Any:
    """Parse a JSON schema.

    Args:
        text: The schema.
        field: The field of the request that holds it.

    Raises:
        InvalidField: The text is not JSON, or is nested too deep.
    """
    try:
        schema = json.loads(text, parse_constant=_refuse_constant)
        json.dumps(schema, allow_nan=False)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        _refuse_schema(field, f"not JSON: {error.msg} at {place}")
    except RecursionError:
        _refuse_schema(field, f"nested more than {MAX_SCHEMA_DEPTH} levels deep")
    except ValueError as error:
        _refuse_schema(field, f"not JSON: {error}")
    if _is_deeper(schema, MAX_SCHEMA_DEPTH):
        _refuse_schema(field, f"nested more than {MAX_SCHEMA_DEPTH} levels deep")
    if isinstance(schema, dict) and _SETTINGS_KEY in schema:
        _refuse_schema(field, f"at #/{_SETTINGS_KEY}: settings of llguidance are not supported")
    return schema


def schema_grammar(schema: Any) -> str:
    """Return the grammar of a parsed JSON schema."""
    return f"start: {json_rule(schema)}{MODEL_SPLITS}"


def json_rule(schema: Any) -> str:
    """Return what stands for the values of a parsed JSON schema in a rule of a grammar."""
    settings = {_SETTINGS_KEY: {"whitespace_pattern": WHITESPACE}}
    if schema is True:
        schema = {}
    whole = {**schema, **settings} if isinstance(schema, dict) else schema
    return f"%json {json.dumps(whole)}"


def _refuse_schema(field: str, problem: str) -> NoReturn:
    # Not as the cause: a traceback would keep the parsed schema alive.
    raise InvalidField([(field, problem)]) from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")


def _is_deeper(value: Any, levels: int) -> bool:
    """Return whether objects and arrays are nested more than ``levels`` deep."""
    level = [value]
    for _ in range(levels):
        level = [part for outer in level for part in _parts(outer)]
        if not level:
            return False
    return any(isinstance(value, dict | list) for value in level)


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list):
        yield from value


def _in_slashes(pattern: str) -> str:
    import llguidance  # noqa: PLC0415 - the server works without it

    return llguidance.regex_to_lark(pattern, "")


def _check_lark(text: str) -> None:
    if found := _REFUSED_ATTRIBUTE.search(text):
        line = text.count("\n", 0, found.end()) + 1
        problem = f"at line {line}: the attribute {found[1]} is not supported"
        raise InvalidField([("constraint.lark", problem)])
