"""Grammars of answers that call tools, in the forms of mlx_lm's parsers."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runner_server.chat import gpt_oss
from runner_server.errors import InvalidField
from runner_server.mlx_backend.constraints import flat_calls
from runner_server.mlx_backend.constraints.flat_forms import FORMS
from runner_server.mlx_backend.constraints.sources import MODEL_SPLITS, json_rule, read_schema

if TYPE_CHECKING:
    from runner_server.engine.types import Constraint
    from runner_server.mlx_backend.tokenizer.codec import FastCodec

_OBJECT = "object"
_SPACE = "/[ \\n]{1,4}/"


@dataclass(frozen=True)
class CallableTool:
    """A tool that may be called.

    Attributes:
        field: Path of its schema in the request.
        name: Its name.
        schema: The schema of its arguments, always an object.
    """

    field: str
    name: str
    schema: dict[str, Any]


def read_tools(constraint: Constraint) -> list[CallableTool]:
    """Return the tools of a constraint of the kind ``tool_calls``.

    Raises:
        InvalidField: A schema is not one of objects, or cannot be used.
    """
    _, _, _, *parts = constraint.texts
    tools = zip(parts[::3], parts[1::3], parts[2::3], strict=True)
    return [
        CallableTool(field, name, _object_schema(field, read_schema(schema, field)))
        for field, name, schema in tools
    ]


def _object_schema(field: str, schema: Any) -> dict[str, Any]:
    kind = schema.get("type", _OBJECT)
    if kind != _OBJECT and not (isinstance(kind, list) and _OBJECT in kind):
        text = f"at #/type: {json.dumps(kind)}; the arguments of a tool are an object"
        raise InvalidField([(field, text)])
    return {**schema, "type": _OBJECT}


def calls_grammar(constraint: Constraint, tools: Sequence[CallableTool], codec: FastCodec) -> str:
    """Return the grammar of one or more calls of tools.

    Args:
        constraint: The constraint, whose texts are the form, the markers before and after calls,
            and for each tool its field, name and schema.
        tools: The tools.
        codec: The model's tokenizer, to tell the tokens of markers from text.
    """
    form, begin, end = constraint.texts[:3]
    write = _Writer(codec)
    if form == "mistral":
        is_named = codec.has_token("[ARGS]")
        start = _mistral_named(write, begin) if is_named else _mistral_list(write, begin)
    else:
        start = _FORMS[form](write, begin, end)
    rules = [start, "tool: " + " | ".join(f"tool{i}" for i in range(len(tools)))]
    if flat := FORMS.get(form):
        text = functools.cache(write.text)
        rules += flat_calls.text_rules(flat, text)
        for i, tool in enumerate(tools):
            rules += flat_calls.tool_rules(flat, text, i, tool.field, tool.name, tool.schema)
        return "\n".join(rules) + MODEL_SPLITS
    for i, tool in enumerate(tools):
        named = write.call(form, tool.name)
        rules += [f"tool{i}: {named[0]} args{i} {named[1]}", f"args{i}: {json_rule(tool.schema)}"]
    return "\n".join(rules) + MODEL_SPLITS


class _Writer:
    """Writes texts in the syntax of Lark, special tokens as such."""

    def __init__(self, codec: FastCodec) -> None:
        self._codec = codec
        self._special = frozenset(codec.special_ids)

    def text(self, text: str) -> str:
        """Return the tokens and texts of a text, one after another."""
        ids = self._codec.encode(text, as_prompt=False)
        if self._special.isdisjoint(ids):
            return _quoted(text.encode())
        parts, plain = [], b""
        for id_ in ids:
            if id_ not in self._special:
                plain += self._codec.token_bytes(id_) or b""
                continue
            parts += [_quoted(plain), f"<[{id_}]>"]
            plain = b""
        return " ".join(part for part in [*parts, _quoted(plain)] if part)

    def call(self, form: str, name: str) -> tuple[str, str]:
        """Return what a call has before and after its arguments."""
        if form == gpt_oss.NAME:
            return self.text(gpt_oss.call_start(name)), ""
        if form == "kimi_k2":
            begin, argument, end = map(self.text, _KIMI)
            return f"{begin} {_quoted(f'functions.{name}:'.encode())} INDEX {argument}", end
        if form == "mistral" and self._codec.has_token("[ARGS]"):
            return f"{_quoted(name.encode())} {self.text('[ARGS]')}", ""
        quoted = json.dumps(name, ensure_ascii=False)
        before = f'{{"name": {quoted}, "arguments": '
        return _quoted(before.encode()), f"{'id?' if form == 'mistral' else ''} {_quoted(b'}')}"


_KIMI = ("<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>")


def _json_tools(write: _Writer, begin: str, end: str) -> str:
    call = f"{write.text(begin)} SPACE? tool SPACE? {write.text(end)}"
    return f"start: (SPACE? call)+\ncall: {call}\nSPACE: {_SPACE}"


def _kimi(write: _Writer, begin: str, end: str) -> str:
    section = f"{write.text(begin)} tool+ {write.text(end)}"
    return f"start: SPACE? {section}\nSPACE: {_SPACE}\nINDEX: /[0-9]{{1,3}}/"


def _mistral_list(write: _Writer, begin: str) -> str:
    calls = f'{write.text(begin)} " "? "[" tool (", " tool)* "]"'
    id_ = r', "id": "'
    return f'start: SPACE? {calls}\nSPACE: {_SPACE}\nid: {json.dumps(id_)} /[a-zA-Z0-9]{{9}}/ "\\""'


def _mistral_named(write: _Writer, begin: str) -> str:
    return f"start: SPACE? ({write.text(begin)} tool)+\nSPACE: {_SPACE}"


def _gpt_oss(_write: _Writer, _begin: str, _end: str) -> str:
    # The token after a call ends the answer.
    return "start: tool"


def _flat(write: _Writer, begin: str, end: str) -> str:
    call = f"{write.text(begin)} tool {write.text(end)}"
    return f"start: (SPACE? {call})+\nSPACE: {_SPACE}"


_FORMS = {
    **dict.fromkeys(FORMS, _flat),
    gpt_oss.NAME: _gpt_oss,
    "json_tools": _json_tools,
    "kimi_k2": _kimi,
    "longcat": _json_tools,
}


def _quoted(data: bytes) -> str:
    return json.dumps(data.decode(), ensure_ascii=False) if data else ""
