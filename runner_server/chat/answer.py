"""An answer in progress: text, reasoning and tool calls told apart."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runner_server.chat.format import CONTENT, REASONING, TOOL, AnswerFormat
from runner_server.chat.splitter import AnswerSplitter, Segment


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool.

    Attributes:
        name: Name of the tool.
        arguments: A JSON object, as text.
        id: The model's own name for the call; may be empty.
    """

    name: str
    arguments: str
    id: str = ""


ParseCalls = Callable[[str], Awaitable[Sequence[Mapping[str, Any]]]]
"""Function from the text between the markers of tool calls to the calls; empty if it has none."""


@dataclass(frozen=True)
class AnswerPart:
    """New parts of an answer."""

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


async def no_calls(_text: str) -> Sequence[Mapping[str, Any]]:
    """Find no calls, as in the answer to a request without tools."""
    return ()


class Answer:
    """Divides the text of an answer, and counts the tokens of its reasoning.

    Args:
        model: The markers of the model.
        prompt: The prompt, in which a template may have opened the reasoning.
        parse_calls: Parses the text of tool calls.
        required: Names of the tools of an answer that is nothing but whole calls of these, so that
            a marker after any other text is a part of a call's arguments. Empty for other answers.

    Attributes:
        reasoning_count: Tokens whose text was complete within the reasoning, its markers included.
        has_calls: Whether there was a tool call.
        is_required: Whether the answer is nothing but calls.
    """

    def __init__(
        self,
        model: AnswerFormat,
        prompt: str,
        parse_calls: ParseCalls = no_calls,
        *,
        required: Collection[str] = (),
    ) -> None:
        self._splitter = AnswerSplitter(model.transitions, model.state_after(prompt))
        self._parse_calls = parse_calls
        self._required = required
        self.is_required = bool(required)
        self._state = self._splitter.state
        self._begin = ""
        self._held = ""
        self.reasoning_count = 0
        self.has_calls = False

    async def add(self, texts: Iterable[str], *, is_last: bool) -> AnswerPart:
        """Add the texts of tokens, one for each; return what they make certain."""
        parts: list[AnswerPart] = []
        for text in texts:
            before = self._splitter.state
            # One by one, because a marker that is none changes how the text after it is divided.
            parts += [await self._part(segment) for segment in self._splitter.feed(text)]
            self.reasoning_count += REASONING in (before, self._splitter.state)
        if is_last:
            parts += [await self._part(segment) for segment in self._splitter.flush()]
        if is_last and self._state == TOOL:
            parts.append(await self._end_calls(""))
        elif is_last:
            # A header that has not ended: the model has written its answer without one.
            parts.append(AnswerPart(content=self._held))
        return AnswerPart(
            "".join(part.content for part in parts),
            "".join(part.reasoning for part in parts),
            tuple(call for part in parts for call in part.tool_calls),
        )

    async def _part(self, segment: Segment) -> AnswerPart:
        before, self._state = self._state, segment.state
        if segment.marker and before == TOOL:
            return await self._end_calls(segment.marker)
        if segment.marker:
            self._begin, self._held = segment.marker, ""
        elif segment.state == REASONING:
            return AnswerPart(reasoning=segment.text)
        elif segment.state == CONTENT:
            return AnswerPart(content=segment.text)
        else:
            self._held += segment.text
        return AnswerPart()

    async def _end_calls(self, end: str) -> AnswerPart:
        """Return the calls in the text since the marker, or that text if there are none."""
        text, self._held = self._held, ""
        calls = _valid_calls(await self._parse_calls(text))
        if self.is_required and any(call.name not in self._required for call in calls):
            calls = ()
        self.has_calls = self.has_calls or bool(calls)
        if calls:
            return AnswerPart(tool_calls=calls)
        if end and self.is_required:
            self._state = self._splitter.state = TOOL
            self._held = text + end
            return AnswerPart()
        return AnswerPart(content=self._begin + text + end)


def _valid_calls(found: Sequence[Mapping[str, Any]]) -> tuple[ToolCall, ...]:
    """Return calls if each of them has a name and an object of arguments; otherwise none."""
    try:
        return tuple(map(_call, found))
    except (AttributeError, TypeError, ValueError, RecursionError):
        return ()


def _call(found: Mapping[str, Any]) -> ToolCall:
    name, arguments, id_ = found.get("name"), found.get("arguments", {}), found.get("id", "")
    if isinstance(arguments, str):
        # Some models write the object as a text.
        arguments = json.loads(arguments)
    if not (isinstance(name, str) and name and isinstance(arguments, dict)):
        raise TypeError("not a call")
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    text.encode()
    return ToolCall(name, text, id_ if isinstance(id_, str) else "")
