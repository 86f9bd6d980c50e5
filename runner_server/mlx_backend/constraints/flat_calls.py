"""Grammars of calls that write arguments one by one: texts as they are, numbers and booleans.

Such a form has no escapes for its own markers, so a grammar that includes only texts without them
is exact, and arrays and objects, whose JSON may have any text inside, are refused.
"""

from __future__ import annotations

import json
import keyword
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from runner_server.errors import InvalidField
from runner_server.mlx_backend.constraints.sources import json_rule

Write = Callable[[str], str]
"""Function from a text to its tokens and texts in the syntax of Lark."""

_ANY = "(?s:.*)"
_ANNOTATIONS = frozenset(("type", "title", "description", "default", "examples"))
_SHAPE = _ANNOTATIONS | {"properties", "required", "additionalProperties", "$schema"}
_NUMERIC = ("integer", "number", "boolean")
_NULL = r"\s*(<!\[CDATA\[)?(?i:null)(\]\]>)?\s*"
"""Text that some parsers read as null, whatever the schema says."""

_EXACT = 2**53
"""Bound of integers without a bound of their own. Some parsers read them as floats."""

_PLAIN = re.compile(r"""[^\x00-\x20<>{}"\\]([^\x00-\x1f<>{}"\\]*[^\x00-\x20<>{}"\\])?""")
"""Texts of an enumeration that all forms write and read alike."""

_DASHED = re.compile(r"[A-Za-z0-9_-]{1,64}")
_WORD = re.compile(r"[A-Za-z0-9_]{1,64}")
_IDENTIFIER = re.compile(rf"(?!(?:{'|'.join(keyword.kwlist)})$)[A-Za-z_][A-Za-z0-9_]{{0,63}}")


@dataclass(frozen=True)
class FlatForm:
    """A form of calls.

    Attributes:
        call: Texts before the name of the tool, after it, and after the arguments.
        key: Texts before the name of an argument and after it, TYPE for the type of its schema.
        end: Text after a number.
        quotes: Texts before and after a text.
        excluded: Pattern of the markers that a text cannot have inside.
        body: Pattern of a text.
        separator: Text between two arguments.
        after: Text after the quote of a text.
        names: Pattern of the names of tools and arguments.
    """

    call: tuple[str, str, str]
    key: tuple[str, str]
    end: str
    quotes: tuple[str, str]
    excluded: str
    body: str = _ANY
    separator: str = ""
    after: str = ""
    names: re.Pattern[str] = _DASHED


_GLM = FlatForm(
    call=("", "\n", ""),
    key=("<arg_key>", "</arg_key>\n<arg_value>"),
    end="</arg_value>\n",
    quotes=("", "</arg_value>"),
    after="\n",
    excluded="<\\/tool_call>",
)
FORMS: Mapping[str, FlatForm] = {
    "function_gemma": FlatForm(
        call=("call:", "{", "}"),
        key=("", ":"),
        end="",
        quotes=("<escape>", "<escape>"),
        separator=",",
        body="[^}]*",
        excluded="<end_function_call>",
        names=_WORD,
    ),
    "gemma4": FlatForm(
        call=("call:", "{", "}"),
        key=("", ":"),
        end="",
        quotes=('<|"|>', '<|"|>'),
        separator=",",
        body="[^\\x00]*",
        excluded="<tool_call\\|>",
        names=_WORD,
    ),
    "glm47": _GLM,
    "kimi_k3": FlatForm(
        call=('<|open|>call tool="', '" index="1"<|sep|>', "<|close|>call<|sep|>"),
        key=('<|open|>argument key="', '" type="TYPE"<|sep|>'),
        end="<|close|>argument<|sep|>",
        quotes=("", "<|close|>argument<|sep|>"),
        excluded="<\\|open\\|>json|<\\|close\\|>(call|tools)<\\|sep\\|>",
    ),
    "laguna": _GLM,
    "minicpm5": FlatForm(
        call=('"', '">', ""),
        key=('<param name="', '">'),
        end="</param>",
        quotes=("", "</param>"),
        excluded="<\\/function>",
    ),
    "minimax_m2": FlatForm(
        call=('\n<invoke name="', '">\n', "</invoke>\n"),
        key=('<parameter name="', '">'),
        end="</parameter>\n",
        quotes=("", "</parameter>"),
        after="\n",
        excluded="<\\/(invoke|minimax:tool_call)>",
    ),
    "pythonic": FlatForm(
        call=("[", "(", ")]"),
        key=("", "="),
        end="",
        quotes=('"', '"'),
        separator=", ",
        body='([^"\\\\\\x00-\\x1f]|\\\\["\\\\nt])*',
        excluded="<\\|tool_call_end\\|>",
        names=_IDENTIFIER,
    ),
    "qwen3_coder": FlatForm(
        call=("\n<function=", ">\n", "</function>\n"),
        key=("<parameter=", ">\n"),
        end="\n</parameter>\n",
        quotes=("", "</parameter>"),
        after="\n",
        excluded="<\\/(function|tool_call)>",
    ),
}


def text_rules(form: FlatForm, write: Write) -> list[str]:
    """Return the rules of a text up to the quote after it, which all arguments share."""
    last = write(form.quotes[1])
    if last.startswith("<["):
        # The token is not a part of any text, unlike its spelling.
        spelled = re.escape(form.quotes[1])
        pattern = f"/{form.body}/ & ~/{_ANY}({form.excluded}|{_slashed(spelled)}){_ANY}/"
        return [f"text: TEXT? {last}", f"TEXT: {pattern} & ~/{_NULL}/"]
    end = _slashed(re.escape(form.quotes[1]))
    pattern = f"/{form.body}{end}/ & ~/{_ANY}({form.excluded}){_ANY}/ & ~/{_NULL}{end}/"
    return ["text[lazy]: TEXT", f"TEXT: {pattern}"]


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
        _refuse(field.removesuffix("parameters") + "name", "this model's calls cannot write it")
    for key in schema:
        if key not in _SHAPE and key not in ("$defs", "definitions"):
            _refuse(field, f"at #/{key}: not supported: {_ONLY}")
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(properties, dict) or not isinstance(required, list):
        _refuse(field, "at #: properties is not an object, or required is not an array")
    if unknown := [key for key in required if not isinstance(key, str) or key not in properties]:
        _refuse(field, f"at #/required: {unknown[0]!r} is not one of the properties")
    begin, middle, end = form.call
    yield f"tool{index}: {write(f'{begin}{name}{middle}')} first{index}_0 {write(end)}"
    for i, (key, value) in enumerate(properties.items()):
        if not form.names.fullmatch(key):
            _refuse(field, f"at #/properties: this model's calls cannot write the name {key!r}")
        kind = value.get("type") if isinstance(value, dict) else None
        before = write(f"{form.key[0]}{key}{form.key[1].replace('TYPE', str(kind))}")
        at, after = f"{index}_{i}", f"{index}_{i + 1}"
        yield f"arg{at}: {before} {_value(form, write, field, key, value)}"
        # The first argument has no separator before it.
        without, mark = ("", "") if key in required else (f" | first{after}", "?")
        yield f"first{at}: arg{at} next{after}{without}"
        yield f"next{at}: ({write(form.separator)} arg{at}){mark} next{after}"
    last = f"{index}_{len(properties)}"
    yield f'first{last}: ""'
    yield f'next{last}: ""'


_ONLY = "this model's calls have texts, numbers and booleans as arguments"


def _value(form: FlatForm, write: Write, field: str, key: str, schema: Any) -> str:
    """Return what stands for the values of an argument in a rule."""
    place = f"at #/properties/{key}"
    kind = schema.get("type") if isinstance(schema, dict) else None
    if kind in _NUMERIC:
        bounds = {"minimum": -_EXACT, "maximum": _EXACT}
        is_free = kind == "integer" and not {"enum", "const"} & schema.keys()
        return f"{json_rule({**bounds, **schema} if is_free else schema)} {write(form.end)}"
    if kind != "string":
        _refuse(field, f"{place}: not supported: {_ONLY}, each with one type")
    limit = next((key for key in ("enum", "const") if key in schema), "")
    if unknown := sorted(schema.keys() - _ANNOTATIONS - {limit}):
        _refuse(field, f"{place}: not supported in this model's calls: {unknown[0]}")
    first, last = map(write, form.quotes)
    if not limit:
        return f"{first} text {write(form.after)}"
    choices = [schema["const"]] if limit == "const" else schema["enum"]
    if not (isinstance(choices, list) and choices):
        _refuse(field, f"{place}: enum is not an array of values")
    for choice in choices:
        is_plain = isinstance(choice, str) and _PLAIN.fullmatch(choice)
        if not is_plain or choice.lower() == "null":
            _refuse(field, f"{place}: this model's calls cannot write {json.dumps(choice)}")
    texts = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)
    return f"{first} ({texts}) {last if first else write(form.end)}"


def _slashed(pattern: str) -> str:
    return pattern.replace("/", "\\/")


def _refuse(field: str, problem: str) -> NoReturn:
    raise InvalidField([(field, problem)])
