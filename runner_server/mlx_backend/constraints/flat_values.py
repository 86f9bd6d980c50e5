"""Values of arguments in calls without JSON arguments, as rules of a grammar.

The parsers of mlx_lm read a value by what its schema says, each in a way of its own. Whatever the
rules allow is read back as a value that is valid by the schema, and everything else is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from runner_server.errors import InvalidField
from runner_server.mlx_backend.constraints.flat_forms import FlatForm, Way, Write
from runner_server.mlx_backend.constraints.sources import json_rule

ANNOTATIONS = frozenset(("type", "title", "description", "default", "examples"))
ONLY = "this model's calls have texts, numbers, booleans and lists of these as arguments"

_NUMERIC = ("integer", "number", "boolean")
_LIST = ANNOTATIONS | {"items", "minItems", "maxItems"}
_LENGTHS = frozenset(("minLength", "maxLength"))

_MAX_ITEMS = 1024
"""Bound of the bounds of a list."""

_EXACT = 2**53
"""Bound of integers without a bound of their own. Some parsers read them as floats."""

_PLAIN = re.compile(r"""[^\x00-\x20<>{}"\\]([^\x00-\x1f<>{}"\\]*[^\x00-\x20<>{}"\\])?""")
"""Texts of an enumeration that all forms write and read alike."""

_LITERAL = r'/"([^"\\\x00-\x1f<]|\\["\\nt])*"/'
"""A text as a literal of Python, without the first character of all markers."""


def values(
    form: FlatForm, write: Write, field: str, place: str, schema: Any
) -> Iterator[tuple[str, str]]:
    """Yield the types of an argument, each with a rule for the values.

    Args:
        form: The form of the calls.
        write: Writes texts.
        field: Path of the tool's schema in the request.
        place: Place of the argument's schema in that.
        schema: The argument's schema.

    Raises:
        InvalidField: The form cannot write all values of the schema, or writes some of them like
            others.
    """
    reader = _Reader(form, write, field, place)
    if not isinstance(schema, dict):
        reader.refuse(f"not supported: {ONLY}")
    base, way, has_null = reader.without_null(schema)
    kind = base.get("type")
    yield str(kind), reader.rule(base, way, is_union=base is not schema)
    if has_null:
        yield "null", f'"null" {write(form.end)}'


class _Reader:
    """Reads the schema of one argument; see :func:`values`."""

    def __init__(self, form: FlatForm, write: Write, field: str, place: str) -> None:
        self._form, self._write = form, write
        self._field, self._place = field, place
        self._end = write(form.end)

    def refuse(self, problem: str, at: str = "") -> NoReturn:
        """Refuse the schema, or the part at a place."""
        refuse(self._field, f"at {self._place}{at}: {problem}")

    def without_null(self, schema: Mapping[str, Any]) -> tuple[Mapping[str, Any], Way, bool]:
        """Return a schema without null, the way to write values, and whether null was allowed."""
        kind = schema.get("type")
        if "anyOf" in schema and kind is None:
            self._check_keys(schema, ANNOTATIONS | {"anyOf"})
            parts = schema["anyOf"] if isinstance(schema["anyOf"], list) else []
            others = [part for part in parts if not _is_null(part)]
            if len(others) != 1 or not isinstance(others[0], dict):
                self.refuse(f"not supported: {ONLY}, or null, each with one type")
            return others[0], self._form.any_of, len(parts) > 1
        if not isinstance(kind, list):
            return schema, "own", False
        others = [each for each in kind if each != "null"]
        if len(others) != 1:
            self.refuse(f"not supported: {ONLY}, or null, each with one type")
        base, has_null = {**schema, "type": others[0]}, "null" in kind
        if isinstance(schema.get("enum"), list):
            base["enum"] = [choice for choice in schema["enum"] if choice is not None]
            has_null = has_null and None in schema["enum"]
        return base, self._form.types, has_null and "const" not in schema

    def rule(self, schema: Mapping[str, Any], way: Way, *, is_union: bool) -> str:
        """Return the rule of the values of a schema with one type."""
        kind = schema.get("type")
        if kind == "array" and self._form.lists == "none":
            self.refuse("not supported: this model's calls have no lists")
        if (kind in _NUMERIC and way == "text") or (kind == "array" and way == "python"):
            other = f'"type": ["{kind}", "null"]' if way == "text" else "anyOf"
            self.refuse(f"this model's calls cannot be read with null in this way; use {other}")
        if kind == "array" and self._form.lists == "quoted":
            return f"{self._quoted_list(schema)} {self._end}"
        if kind == "array" or (way == "json" and kind in ("string", *_NUMERIC)):
            return f"{json_rule(self._json(schema, ''))} {self._end}"
        if kind == "boolean" and way == "python":
            self._check_keys(schema, ANNOTATIONS)
            return f'("True" | "False") {self._end}'
        if kind in _NUMERIC:
            return f"{json_rule(_bounded(schema))} {self._end}"
        if kind != "string":
            self.refuse(f"not supported: {ONLY}, each with one type")
        if way == "python":
            return f"{self._literal(schema)} {self._end}"
        return self._text(schema, "other" if is_union and self._form.apart else "text")

    def _text(self, schema: Mapping[str, Any], free: str) -> str:
        first, last = map(self._write, self._form.quotes)
        choices = self._choices(schema)
        if choices is None:
            return f"{first} {free} {self._write(self._form.after)}"
        for choice in choices:
            if free == "other" and re.fullmatch(self._form.apart, choice):
                self.refuse(f"this model's calls cannot write {json.dumps(choice)} with null")
        return f"{first} ({_alternatives(choices)}) {last if first else self._end}"

    def _literal(self, schema: Mapping[str, Any]) -> str:
        choices = self._choices(schema)
        if choices is None:
            return _LITERAL
        return f"({_alternatives([json.dumps(each, ensure_ascii=False) for each in choices])})"

    def _choices(self, schema: Mapping[str, Any], at: str = "") -> list[str] | None:
        """Return the texts of ``enum`` or ``const``; None if a schema has neither."""
        limit = next((key for key in ("enum", "const") if key in schema), "")
        if unknown := sorted(schema.keys() - ANNOTATIONS - {limit}):
            self.refuse(f"not supported in this model's calls: {unknown[0]}", at)
        if not limit:
            return None
        choices = [schema["const"]] if limit == "const" else schema["enum"]
        if not (isinstance(choices, list) and choices):
            self.refuse("enum is not an array of values", at)
        for choice in choices:
            is_plain = isinstance(choice, str) and _PLAIN.fullmatch(choice)
            if not is_plain or choice.lower() == "null":
                self.refuse(f"this model's calls cannot write {json.dumps(choice)}", at)
        return choices

    def _quoted_list(self, schema: Mapping[str, Any]) -> str:
        """Return the rule of a list whose texts have the form's own quotes."""
        items = schema.get("items")
        if not isinstance(items, dict) or items.get("type") != "string":
            return json_rule(self._json(schema, "", has_texts=False))
        self._check_keys(schema, _LIST)
        first, last = map(self._write, self._form.quotes)
        choices = self._choices(items, "/items")
        text = "text" if choices is None else f"({_alternatives(choices)}) {last}"
        low, high = schema.get("minItems", 0), schema.get("maxItems")
        if not _is_count(low) or not (high is None or (_is_count(high) and high >= max(1, low))):
            self.refuse(f"minItems to maxItems is not a range of counts below {_MAX_ITEMS}")
        most = "" if high is None else high - 1
        more = f"({self._write(self._form.separator)} {first} {text}){{{max(0, low - 1)},{most}}}"
        return f'"[" ({first} {text} {more}){"" if low else "?"} "]"'

    def _json(self, schema: Any, at: str, *, has_texts: bool = True) -> dict[str, Any]:
        """Return a schema of JSON values in which no text begins a marker of the form.

        Args:
            schema: The schema of an argument, or of the items of a list.
            at: Place of the schema in that of the argument.
            has_texts: Whether texts can be written as JSON.
        """
        if not isinstance(schema, dict):
            self.refuse(f"not supported: {ONLY}", at)
        if isinstance(schema.get("anyOf"), list) and "type" not in schema:
            parts = [
                self._json(part, f"{at}/anyOf/{i}", has_texts=has_texts)
                for i, part in enumerate(schema["anyOf"])
            ]
            return {**schema, "anyOf": parts}
        kind = schema.get("type")
        if isinstance(kind, list):
            parts = [self._json({**schema, "type": each}, at, has_texts=has_texts) for each in kind]
            return {"anyOf": parts}
        if kind == "array":
            self._check_keys(schema, _LIST, at)
            items = self._json(schema.get("items"), f"{at}/items", has_texts=has_texts)
            return {**schema, "items": items}
        if kind in _NUMERIC or kind == "null":
            return _bounded(schema)
        if kind != "string" or not has_texts:
            self.refuse(f"not supported: {ONLY}", at)
        if self._choices({key: schema[key] for key in schema.keys() - _LENGTHS}, at):
            return schema
        return {**schema, "pattern": "^[^<]*$"}

    def _check_keys(self, schema: Mapping[str, Any], known: frozenset[str], at: str = "") -> None:
        if unknown := sorted(schema.keys() - known):
            self.refuse(f"not supported in this model's calls: {unknown[0]}", at)


def _bounded(schema: Mapping[str, Any]) -> dict[str, Any]:
    is_free = schema["type"] == "integer" and not {"enum", "const"} & schema.keys()
    return {"minimum": -_EXACT, "maximum": _EXACT, **schema} if is_free else {**schema}


def _is_null(schema: object) -> bool:
    return isinstance(schema, dict) and schema.get("type") == "null"


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MAX_ITEMS


def _alternatives(texts: list[str]) -> str:
    return " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)


def refuse(field: str, problem: str) -> NoReturn:
    """Refuse the schema of a tool."""
    raise InvalidField([(field, problem)])
