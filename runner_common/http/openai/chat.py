"""``POST /v1/chat/completions``."""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mlxrunner.v1 import runner_pb2 as pb
from runner_common.http.fields import Fields
from runner_common.http.openai.conversation import read_messages, read_tools
from runner_common.http.openai.generations import (
    DONE,
    FINISH_REASONS,
    Frame,
    Head,
    encode,
    nothing,
    together,
    usage_of,
)
from runner_common.http.openai.logprobs import chat_logprobs, without_end
from runner_common.http.openai.models import named
from runner_common.http.openai.options import (
    Delivery,
    json_text,
    read_common,
    read_delivery,
    read_options,
    read_structure,
    seed_of,
)
from runner_common.http.openai.unsupported import check_unsupported

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from runner_common.http.body import JsonObject
    from runner_common.http.call import HttpCall
    from runner_common.http.exchange import Exchange
    from runner_common.http.host import Host
    from runner_common.http.openai.generations import Accept

_MAX_TOP_LOGPROBS = 20


@dataclass(frozen=True, slots=True)
class ChatOrder:
    """A request for an answer, translated.

    Attributes:
        request: The request of the first choice.
        delivery: How the answer is delivered.
        is_single_call: Whether an answer has one call of a tool at most.
    """

    request: pb.ChatRequest
    delivery: Delivery
    is_single_call: bool

    def choice(self, index: int) -> pb.ChatRequest:
        """Return the request of a choice."""
        made = pb.ChatRequest()
        made.CopyFrom(self.request)
        if made.options.HasField("seed"):
            made.options.seed = seed_of(made.options.seed, index)
        return made


def read_chat(body: JsonObject) -> ChatOrder:
    """Translate a request.

    Raises:
        UnreadableRequestError: A field is missing, invalid or not supported.
    """
    fields = Fields(body)
    delivery = read_delivery(fields)
    request = pb.ChatRequest(model=delivery.model, options=read_options(fields))
    request.messages.extend(read_messages(fields))
    read_tools(fields, request)
    is_single_call = fields.boolean("parallel_tool_calls") is False
    read_structure(fields, request)
    read_common(fields, request)
    _read_logprobs(fields, request)
    _read_reasoning(fields, request)
    check_unsupported(fields)
    fields.finish()
    return ChatOrder(request, delivery, is_single_call)


def _read_logprobs(fields: Fields, request: pb.ChatRequest) -> None:
    is_wanted = fields.boolean("logprobs")
    count = fields.integer("top_logprobs", 0, _MAX_TOP_LOGPROBS)
    if is_wanted:
        request.logprobs = count or 0
    elif count:
        fields.refuse("top_logprobs", "only with logprobs")


def _read_reasoning(fields: Fields, request: pb.ChatRequest) -> None:
    """Read the arguments of the chat template, of which ``reasoning_effort`` is one."""
    arguments = dict(fields.mapping("chat_template_kwargs") or {})
    if (effort := fields.text("reasoning_effort")) is not None:
        arguments["reasoning_effort"] = effort
    if arguments:
        request.chat_template_kwargs = json_text(arguments)
    if (budget := fields.integer("reasoning_budget", 0)) is not None:
        request.reasoning_budget = budget


async def chat(host: Host, exchange: Exchange, body: JsonObject) -> None:
    """Answer a conversation."""
    order = read_chat(body)
    model = await named(host, exchange, order.delivery.model)
    if order.delivery.is_stream:
        await _stream(host, exchange, order, model)
    else:
        await _whole(host, exchange, order, model)


@dataclass(slots=True)
class _Answer:
    """The messages of an answer, collected."""

    content: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[pb.ToolCall] = field(default_factory=list)
    logprobs: list[pb.TokenLogprob] = field(default_factory=list)
    end: pb.ChatResponse = field(default_factory=pb.ChatResponse)

    def add(self, message: pb.ChatResponse) -> None:
        self.content.append(message.content)
        self.reasoning.append(message.reasoning)
        self.calls.extend(message.tool_calls)
        self.logprobs.extend(without_end(message.logprobs, is_last=message.done))
        self.end = message

    def choice(self, index: int, order: ChatOrder) -> dict[str, Any]:
        """Return the answer as a choice."""
        calls = [_call(call) for call in self.calls[: 1 if order.is_single_call else None]]
        content, reasoning = "".join(self.content), "".join(self.reasoning)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message |= {"content": content or None, "tool_calls": calls}
        has_logprobs = order.request.HasField("logprobs")
        return {
            "index": index,
            "message": message,
            "logprobs": chat_logprobs(self.logprobs) if has_logprobs else None,
            "finish_reason": FINISH_REASONS.get(self.end.done_reason, "stop"),
        }


async def _whole(host: Host, exchange: Exchange, order: ChatOrder, model: str) -> None:
    answers = [_Answer() for _ in range(order.delivery.choices)]

    async def run(index: int, call: HttpCall, _accept: Accept) -> None:
        async with aclosing(host.chat(order.choice(index), call)) as messages:
            async for message in messages:
                answers[index].add(message)

    await together(exchange.call, len(answers), run, nothing)
    ends = [answer.end for answer in answers]
    await exchange.send_json(
        {
            **Head("chat.completion", model, "chatcmpl").fields(),
            "choices": [answer.choice(index, order) for index, answer in enumerate(answers)],
            "usage": usage_of(ends, ends[:1]),
        }
    )


async def _stream(host: Host, exchange: Exchange, order: ChatOrder, model: str) -> None:
    head = Head("chat.completion.chunk", model, "chatcmpl")
    choices = [_StreamedChoice(head, index, order) for index in range(order.delivery.choices)]

    async def run(index: int, call: HttpCall, accept: Accept) -> None:
        choice = choices[index]
        async with aclosing(host.chat(order.choice(index), call)) as messages:
            async for message in messages:
                await accept()
                if events := choice.events(message):
                    await exchange.send_part(events)

    async def begin() -> None:
        await exchange.begin_stream("text/event-stream; charset=utf-8")
        await exchange.send_part(b"".join(choice.first() for choice in choices))

    await together(exchange.call, len(choices), run, begin)
    await exchange.end_stream(_last(head, order.delivery, [choice.end for choice in choices]))


def _last(head: Head, delivery: Delivery, ends: Sequence[pb.ChatResponse]) -> bytes:
    if not delivery.includes_usage:
        return DONE
    return head.event([], usage_of(ends, ends[:1])) + DONE


class _StreamedChoice:
    """A choice of a stream.

    Args:
        head: The fields that all events have.
        index: Index of the choice.
        order: The request.
    """

    def __init__(self, head: Head, index: int, order: ChatOrder) -> None:
        self._frame = Frame(head, index, "delta", order.delivery)
        self._has_logprobs = order.request.HasField("logprobs")
        self._most_calls = 1 if order.is_single_call else None
        self._call_count = 0
        self.end = pb.ChatResponse()

    def first(self) -> bytes:
        """Return the first event of the choice."""
        return self._frame.event('{"role":"assistant","content":"","refusal":null}')

    def events(self, message: pb.ChatResponse) -> bytes:
        """Return the events for a message; empty for progress of the prefill."""
        found = b""
        logprobs = None
        if self._has_logprobs and message.logprobs:
            entries = without_end(message.logprobs, is_last=message.done)
            logprobs = chat_logprobs(entries)
        if message.reasoning:
            found = self._frame.event(f'{{"reasoning_content":{encode(message.reasoning)}}}')
        # A token whose text is held back comes with an empty text.
        if message.content or logprobs:
            found += self._frame.event(f'{{"content":{encode(message.content)}}}', logprobs)
        if calls := self._calls(message.tool_calls):
            found += self._frame.event(encode({"tool_calls": calls}))
        if message.done:
            self.end = message
            reason = FINISH_REASONS.get(message.done_reason, "stop")
            found += self._frame.event("{}", None, reason)
        return found

    def _calls(self, calls: Iterable[pb.ToolCall]) -> list[dict[str, Any]]:
        first = self._call_count
        wanted = list(calls)[: None if self._most_calls is None else self._most_calls - first]
        self._call_count += len(wanted)
        return [{"index": first + i, **_call(call)} for i, call in enumerate(wanted)]


def _call(call: pb.ToolCall) -> dict[str, Any]:
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }
