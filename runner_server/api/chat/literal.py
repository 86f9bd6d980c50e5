"""Conversations in which only special tokens of the template count, and other ones are text."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from runner_server.chat.format import AnswerFormat
from runner_server.chat.renderer import ChatRenderer, Conversation
from runner_server.engine.backend import MarkedCodec, ModelHandle
from runner_server.errors import InvalidField

_MARKS = tuple(map(chr, range(0x13000, 0x13100)))
"""Characters for marks: Egyptian hieroglyphs, which are letters without upper case. Unlike control
and private-use characters, they are left as they are by filters of templates such as ``trim`` and
``tojson``, and by Python's ``repr``."""

_Change = Callable[[str], str]


async def encode_literal(
    renderer: ChatRenderer, model: ModelHandle, conversation: Conversation, text: str
) -> list[int]:
    """Return the tokens of a conversation's prompt, whose special tokens are the template's own.

    The conversation is rendered once more with a mark in each special token of its texts. Without
    the marks, both prompts are the same, so the template neither saw a difference nor cut a token.

    Args:
        renderer: Renders templates.
        model: The model.
        conversation: The conversation.
        text: Its prompt.

    Raises:
        InvalidField: The marks change the prompt, or special tokens cannot be text
            for this tokenizer.
        RunnerFault: See :meth:`ChatRenderer.render`.
    """
    mark = next((char for char in _MARKS if char not in text and _escaped(char) not in text), None)
    if mark is None:
        problem = f"the conversation has all characters from {_MARKS[0]} to {_MARKS[-1]}"
        raise InvalidField([("literal", problem)])
    format_ = model.info.chat
    codec = await asyncio.to_thread(_marked_codec, model)
    marked = await asyncio.to_thread(_marked, conversation, mark, codec, format_.answer)
    if marked is not conversation:
        marked_text = await renderer.render(format_, marked)
        marked_text = marked_text.replace(_escaped(mark), mark)
        if marked_text.replace(mark, "") != text:
            raise _is_altered()
        text = marked_text
    return await asyncio.to_thread(codec.encode, text, mark)


def _marked_codec(model: ModelHandle) -> MarkedCodec:
    return model.codec.marked(model.info.chat.source)


def _escaped(mark: str) -> str:
    """Return a mark as ``tojson`` writes it in ASCII."""
    return json.dumps(mark)[1:-1]


def _is_altered() -> InvalidField:
    problem = (
        "the model's chat template looks for special tokens in the texts, or alters them, so they "
        "cannot be told from its own; remove them from the texts"
    )
    return InvalidField([("literal", problem)])


def _marked(
    conversation: Conversation, mark: str, codec: MarkedCodec, answer: AnswerFormat
) -> Conversation:
    """Return a conversation with marks in the special tokens of messages and tools.

    Raises:
        InvalidField: A message or a tool is nested too deeply.
    """
    try:
        texts = [*{*_texts([conversation.messages, conversation.tools])}]
        marked = dict(zip(texts, codec.mark(texts, mark), strict=True))
        if all(old == new for old, new in marked.items()):
            return conversation

        def change(text: str) -> str:
            return marked[text]

        return replace(
            conversation,
            messages=[_message(message, change, mark, answer) for message in conversation.messages],
            tools=conversation.tools and [_object(tool, change) for tool in conversation.tools],
        )
    except RecursionError:
        problem = "the arguments of a call, or the schema of a tool, are nested too deeply"
        raise InvalidField([("literal", problem)]) from None


def _message(
    message: Mapping[str, Any], change: _Change, mark: str, answer: AnswerFormat
) -> Mapping[str, Any]:
    """Return a message with marks, except in the model's own markers in its answers.

    Templates look for those of reasoning, which they leave out of earlier turns.
    """
    found = _object(message, change)
    if message["role"] == "assistant" and "content" in message:
        found["content"] = _changed(
            found["content"], lambda text: _with_markers(text, mark, answer)
        )
    return found


def _with_markers(text: str, mark: str, answer: AnswerFormat) -> str:
    for marker in (answer.think_start, answer.think_end, *answer.call_markers):
        if marker:
            text = text.replace(f"{marker[0]}{mark}{marker[1:]}", marker)
    return text


def _texts(value: object) -> Iterator[str]:
    """Yield the texts of plain JSON data, keys of objects included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, dict):
        yield from value
        yield from _texts([*value.values()])


def _changed(value: object, change: _Change) -> object:
    """Return plain JSON data with changed texts."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list | tuple):
        return [_changed(item, change) for item in value]
    return _object(value, change) if isinstance(value, dict) else value


def _object(value: Mapping[str, Any], change: _Change) -> dict[str, Any]:
    """Return an object of JSON with changed texts."""
    return {change(key): _changed(item, change) for key, item in value.items()}
