"""Several generations for one request, and common parts of answers."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mlxrunner.v1 import runner_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence

    from runner_common.http.call import HttpCall
    from runner_common.http.openai.options import Delivery

    Accept = Callable[[], Awaitable[None]]
    Last = pb.ChatResponse | pb.CompletionResponse

FINISH_REASONS = {
    pb.DONE_REASON_STOP: "stop",
    pb.DONE_REASON_LENGTH: "length",
    pb.DONE_REASON_TOOL_CALLS: "tool_calls",
}

encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
"""Return the JSON text of a value. ``json.dumps`` would make an encoder for each of them."""

DONE = b"data: [DONE]\n\n"
"""The last event of a stream."""


async def together(
    call: HttpCall,
    count: int,
    run: Callable[[int, HttpCall, Accept], Awaitable[None]],
    begin: Accept,
) -> None:
    """Run several generations at once. If one fails, the others are cancelled.

    Args:
        call: The call of the request.
        count: The number of generations.
        run: Runs the generation with an index; gets the call for it, and a function to await at
            its first message.
        begin: Awaited once, when all generations are accepted, before any output.
    """
    waiting = set(range(count))
    are_accepted = asyncio.Event()

    async def one(index: int) -> None:
        async def accept() -> None:
            if index not in waiting:
                return
            waiting.discard(index)
            if waiting:
                await are_accepted.wait()
            else:
                await begin()
                are_accepted.set()

        await run(index, call.accepting(accept), accept)

    if count == 1:
        await one(0)
        return
    try:
        async with asyncio.TaskGroup() as group:
            for index in range(count):
                group.create_task(one(index))
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from failed


async def nothing() -> None:
    """Begin an answer in one piece."""


@dataclass(frozen=True, slots=True)
class Head:
    """Common fields of the parts of an answer.

    Attributes:
        kind: The value of ``object``.
        model: Name of the model, as requested.
        prefix: Beginning of the id.
    """

    kind: str
    model: str
    prefix: str
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def fields(self) -> dict[str, Any]:
        """Return the fields as a JSON object."""
        return {
            "id": f"{self.prefix}-{self.id}",
            "object": self.kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": None,
        }

    def event(self, choices: list[Any], usage: dict[str, Any]) -> bytes:
        """Return an event of a stream without its own frame."""
        return f"data: {encode({**self.fields(), 'choices': choices, 'usage': usage})}\n\n".encode()


class Frame:
    """The fixed parts of a choice's events, encoded once.

    Args:
        head: The fields that all events have.
        index: Index of the choice.
        key: Name of the field with the text or the delta.
        delivery: How the answer is delivered.
    """

    def __init__(self, head: Head, index: int, key: str, delivery: Delivery) -> None:
        fixed = encode(head.fields())[:-1]
        self._start = f'data: {fixed},"choices":[{{"index":{index},"{key}":'
        self._end = "]" + (',"usage":null' if delivery.includes_usage else "") + "}\n\n"
        self._plain = f',"logprobs":null,"finish_reason":null}}{self._end}'

    def event(self, value: str, logprobs: object = None, reason: str | None = None) -> bytes:
        """Return an event.

        Args:
            value: The text or the delta, as JSON.
            logprobs: The log probabilities, if requested.
            reason: Why the choice has ended; None if it has not.
        """
        if logprobs is None and reason is None:
            return (self._start + value + self._plain).encode()
        rest = f',"logprobs":{encode(logprobs)},"finish_reason":{encode(reason)}}}'
        return (self._start + value + rest + self._end).encode()


def usage_of(ends: Sequence[Last], prompts: Iterable[Last]) -> dict[str, Any]:
    """Return the usage.

    Args:
        ends: The last messages of all generations.
        prompts: The last message of one generation for each prompt.
    """
    prompts = list(prompts)
    prompt = sum(end.prompt_eval_count for end in prompts)
    generated = sum(end.eval_count for end in ends)
    reasoning = sum(end.reasoning_eval_count for end in ends if isinstance(end, pb.ChatResponse))
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": sum(end.prompt_cached_count for end in prompts)},
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    }
