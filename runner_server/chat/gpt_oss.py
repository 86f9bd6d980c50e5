"""Answers of gpt-oss: messages in channels, and the parser of its tool calls.

An answer goes on after ``<|start|>assistant``, with a header and a text for each message::

    <|channel|>analysis<|message|>I need the weather.<|end|><|start|>assistant
    <|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"place": "Ulm"}

The recipient may come before the channel. ``<|call|>`` or ``<|return|>``, which end the answer, are
not a part of its text.
"""

from __future__ import annotations

import json
import re
from typing import Any

from runner_server.chat.format import CONTENT, HEADER, REASONING, TOOL, AnswerFormat

NAME = "gpt_oss"

_ANALYSIS_HEADER = "analysis header"
_MESSAGE = "<|message|>"
_NEXT = "<|end|><|start|>assistant"
_RECIPIENT = "to=functions."
_TEMPLATE_TEXTS = ("<|start|>assistant", "<|channel|>analysis<|message|>")
_CALL = re.compile(r"([^\s<]+).*?<\|message\|>(.*)", re.DOTALL)

FORMAT = AnswerFormat(
    transitions={
        HEADER: (
            ("<|channel|>analysis", _ANALYSIS_HEADER),
            (_RECIPIENT, TOOL),
            (_MESSAGE, CONTENT),
        ),
        _ANALYSIS_HEADER: ((_RECIPIENT, TOOL), (_MESSAGE, REASONING)),
        REASONING: ((_NEXT, HEADER),),
        CONTENT: ((_NEXT, HEADER),),
        TOOL: (("<|call|>", HEADER),),
    },
    initial=HEADER,
    think_start="<|channel|>analysis<|message|>",
    content_start="<|channel|>final<|message|>",
    tool_parser=__file__,
)


def is_named(parser: object, template: str) -> bool:
    """Return whether a model writes such answers.

    Args:
        parser: The parser of tool calls that the model's files name; None for none.
        template: The model's chat template.
    """
    if parser:
        return parser == NAME
    return all(text in template for text in _TEMPLATE_TEXTS)


def call_start(name: str) -> str:
    """Return the text of a call before its arguments."""
    return f"<|channel|>commentary {_RECIPIENT}{name} <|constrain|>json{_MESSAGE}"


def parse_tool_call(text: str, _tools: object = None) -> dict[str, Any]:
    """Return the call in a text that begins with the name of a tool, like parsers of mlx_lm.

    Raises:
        ValueError: The text is not a call.
    """
    found = _CALL.fullmatch(text)
    if not found:
        raise ValueError("not a call")
    return {"name": found[1], "arguments": json.loads(found[2])}
