"""Grammars of calls whose arguments come one by one: plain texts, numbers, booleans and lists.

Such a form has no escapes for its own markers, so a grammar that includes only texts without them
is exact. Objects, whose JSON may have any text inside, are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from runner_server.mlx_backend.constraints.flat_forms import ANY, NULL, FlatForm, Write
from runner_server.mlx_backend.constraints.flat_values import ANNOTATIONS, ONLY, refuse, values

_SHAPE = ANNOTATIONS | {"properties", "required", "additionalProperties", "$schema"}


def text_rules(form: FlatForm, write: Write) -> list[str]:
    """Return the rules of a text up to the quote after a text, for the arguments of every tool.

    The rule ``text`` is for arguments that are texts, ``other`` for those that may be null, too.
    """
    rules = _text_rules(form, write, "text", NULL)
    return (
        rules + _text_rules(form, write, "other", f"{NULL}|{form.apart}") if form.apart else rules
    )


def _text_rules(form: FlatForm, write: Write, name: str, never: str) -> list[str]:
    last, terminal = write(form.quotes[1]), name.upper()
    if last.startswith("<["):
        # The token is not a part of any text, unlike its spelling.
        spelled = re.escape(form.quotes[1])
        pattern = f"/{form.body}/ & ~/{ANY}({form.excluded}|{_slashed(spelled)}){ANY}/"
        return [f"{name}: {terminal}? {last}", f"{terminal}: {pattern} & ~/{never}/"]
    end = _slashed(re.escape(form.quotes[1]))
    pattern = f"/{form.body}{end}/ & ~/{ANY}({form.excluded}){ANY}/ & ~/({never}){end}/"
    return [f"{name}[lazy]: {terminal}", f"{terminal}: {pattern}"]


def _slashed(pattern: str) -> str:
    return pattern.replace("/", "\\/")


def tool_rules(
    form: FlatForm, write: Write, index: int, field: str, name: str, schema: Mapping[str, Any]
) -> Iterator[str]:
    """Yield the rules of the calls of one tool.

    Args:
        form: The form.
        write: Writes texts.
        index: Number of the tool, a part of the names of its rules.
        field: Path of the schema in the request.
        name: Name of the tool.
        schema: Schema of the arguments.

    Raises:
        InvalidField: The form cannot write the name, or all arguments of the schema.
    """
    if not form.names.fullmatch(name):
        refuse(field.removesuffix("parameters") + "name", "this model's calls cannot write it")
    for key in schema:
        if key not in _SHAPE and key not in ("$defs", "definitions"):
            refuse(field, f"at #/{key}: not supported: {ONLY}")
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(properties, dict) or not isinstance(required, list):
        refuse(field, "at #: properties is not an object, or required is not an array")
    if unknown := [key for key in required if not isinstance(key, str) or key not in properties]:
        refuse(field, f"at #/required: {unknown[0]!r} is not one of the properties")
    begin, middle, end = form.call
    yield f"tool{index}: {write(f'{begin}{name}{middle}')} first{index}_0 {write(end)}"
    for i, (key, value) in enumerate(properties.items()):
        if not form.names.fullmatch(key):
            refuse(field, f"at #/properties: this model's calls cannot write the name {key!r}")
        at, after = f"{index}_{i}", f"{index}_{i + 1}"
        yield f"arg{at}: " + " | ".join(
            f"{write(form.key[0] + key + form.key[1].replace('TYPE', kind))} {rule}"
            for kind, rule in values(form, write, field, f"#/properties/{key}", value)
        )
        # The first argument has no separator before it.
        without, mark = ("", "") if key in required else (f" | first{after}", "?")
        yield f"first{at}: arg{at} next{after}{without}"
        yield f"next{at}: ({write(form.separator)} arg{at}){mark} next{after}"
    last = f"{index}_{len(properties)}"
    yield f'first{last}: ""'
    yield f'next{last}: ""'
