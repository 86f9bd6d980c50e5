"""``POST /v1/completions``."""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mlxrunner.v1 import runner_pb2 as pb
from runner_common.http.fields import Fields, kind_of
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
from runner_common.http.openai.logprobs import CompletionLogprobs, without_end
from runner_common.http.openai.models import named
from runner_common.http.openai.options import (
    MAX_CHOICES,
    Delivery,
    read_common,
    read_delivery,
    read_ids,
    read_options,
    read_structure,
    seed_of,
)
from runner_common.http.openai.unsupported import check_unsupported

if TYPE_CHECKING:
    from runner_common.http.body import JsonObject
    from runner_common.http.call import HttpCall
    from runner_common.http.exchange import Exchange
    from runner_common.http.host import Host
    from runner_common.http.openai.generations import Accept

Prompt = str | list[int]

_MAX_LOGPROBS = 20


@dataclass(frozen=True, slots=True)
class CompletionOrder:
    """A request for completions, translated.

    Attributes:
        request: The request of the first choice, without a prompt.
        prompts: The prompts, of which each has ``delivery.choices`` choices.
        delivery: How the answer is delivered.
    """

    request: pb.CompletionRequest
    prompts: list[Prompt]
    delivery: Delivery

    @property
    def count(self) -> int:
        """The number of all choices."""
        return len(self.prompts) * self.delivery.choices

    def choice(self, index: int) -> pb.CompletionRequest:
        """Return the request of a choice."""
        made = pb.CompletionRequest()
        made.CopyFrom(self.request)
        prompt = self.prompts[index // self.delivery.choices]
        if isinstance(prompt, str):
            made.prompt = prompt
        else:
            made.prompt_token_ids.ids.extend(prompt)
        if made.options.HasField("seed"):
            made.options.seed = seed_of(made.options.seed, index % self.delivery.choices)
        return made

    def usage(self, ends: list[pb.CompletionResponse]) -> dict[str, Any]:
        """Return the usage, given the last messages of all choices."""
        return usage_of(ends, ends[:: self.delivery.choices])


def read_completion(body: JsonObject) -> CompletionOrder:
    """Translate a request.

    Raises:
        UnreadableRequestError: A field is missing, invalid or not supported.
    """
    fields = Fields(body)
    delivery = read_delivery(fields)
    request = pb.CompletionRequest(model=delivery.model, options=read_options(fields))
    prompts = _prompts(fields)
    if len(prompts) * delivery.choices > MAX_CHOICES:
        fields.refuse("n", f"{len(prompts)} prompts times n; at most {MAX_CHOICES} together")
    if (count := fields.integer("logprobs", 0, _MAX_LOGPROBS)) is not None:
        request.logprobs = count
    read_structure(fields, request)
    read_common(fields, request)
    check_unsupported(fields)
    fields.finish()
    return CompletionOrder(request, prompts, delivery)


def _prompts(fields: Fields) -> list[Prompt]:
    value = fields.take("prompt")
    match value:
        case str():
            return [value]
        case [str(), *_] if all(isinstance(each, str) for each in value):
            return list(value)
        case [int(), *_]:
            return [read_ids(fields, "prompt", value)]
        case [[*_], *_] if all(isinstance(each, list) for each in value):
            return [read_ids(fields, f"prompt[{i}]", each) for i, each in enumerate(value)]
    text = "required: a text, a list of texts, a list of token ids, or a list of such lists"
    fields.refuse("prompt", f"{text}, not {kind_of(value)} of others" if value else text)
    return []


async def complete(host: Host, exchange: Exchange, body: JsonObject) -> None:
    """Complete prompts."""
    order = read_completion(body)
    model = await named(host, exchange, order.delivery.model)
    if order.delivery.is_stream:
        await _stream(host, exchange, order, model)
    else:
        await _whole(host, exchange, order, model)


@dataclass(slots=True)
class _Text:
    """The messages of a text, collected."""

    content: list[str] = field(default_factory=list)
    logprobs: list[pb.TokenLogprob] = field(default_factory=list)
    end: pb.CompletionResponse = field(default_factory=pb.CompletionResponse)

    def add(self, message: pb.CompletionResponse) -> None:
        self.content.append(message.content)
        self.logprobs.extend(without_end(message.logprobs, is_last=message.done))
        self.end = message

    def choice(self, index: int, order: CompletionOrder) -> dict[str, Any]:
        """Return the text as a choice."""
        has_logprobs = order.request.HasField("logprobs")
        return {
            "index": index,
            "text": "".join(self.content),
            "logprobs": CompletionLogprobs().add(self.logprobs) if has_logprobs else None,
            "finish_reason": FINISH_REASONS.get(self.end.done_reason, "stop"),
        }


async def _whole(host: Host, exchange: Exchange, order: CompletionOrder, model: str) -> None:
    texts = [_Text() for _ in range(order.count)]

    async def run(index: int, call: HttpCall, _accept: Accept) -> None:
        async with aclosing(host.completion(order.choice(index), call)) as messages:
            async for message in messages:
                texts[index].add(message)

    await together(exchange.call, len(texts), run, nothing)
    await exchange.send_json(
        {
            **Head("text_completion", model, "cmpl").fields(),
            "choices": [text.choice(index, order) for index, text in enumerate(texts)],
            "usage": order.usage([text.end for text in texts]),
        }
    )


async def _stream(host: Host, exchange: Exchange, order: CompletionOrder, model: str) -> None:
    head = Head("text_completion", model, "cmpl")
    choices = [_StreamedText(head, index, order) for index in range(order.count)]

    async def run(index: int, call: HttpCall, accept: Accept) -> None:
        choice = choices[index]
        async with aclosing(host.completion(order.choice(index), call)) as messages:
            async for message in messages:
                await accept()
                if events := choice.events(message):
                    await exchange.send_part(events)

    async def begin() -> None:
        await exchange.begin_stream("text/event-stream; charset=utf-8")

    await together(exchange.call, len(choices), run, begin)
    usage = b""
    if order.delivery.includes_usage:
        usage = head.event([], order.usage([choice.end for choice in choices]))
    await exchange.end_stream(usage + DONE)


class _StreamedText:
    """A choice of a stream.

    Args:
        head: The fields that all events have.
        index: Index of the choice.
        order: The request.
    """

    def __init__(self, head: Head, index: int, order: CompletionOrder) -> None:
        self._frame = Frame(head, index, "text", order.delivery)
        self._logprobs = CompletionLogprobs() if order.request.HasField("logprobs") else None
        self.end = pb.CompletionResponse()

    def events(self, message: pb.CompletionResponse) -> bytes:
        """Return the events for a message; empty for progress of the prefill."""
        found = b""
        logprobs = None
        if self._logprobs and message.logprobs:
            logprobs = self._logprobs.add(without_end(message.logprobs, is_last=message.done))
        # A token whose text is held back comes with an empty text.
        if message.content or logprobs:
            found = self._frame.event(encode(message.content), logprobs)
        if message.done:
            self.end = message
            reason = FINISH_REASONS.get(message.done_reason, "stop")
            found += self._frame.event('""', None, reason)
        return found
