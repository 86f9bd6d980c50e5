"""Answers of ``/api/chat`` and ``/api/generate``, whole or in parts."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from mlxrunner.v1 import runner_pb2 as pb

if TYPE_CHECKING:
    Response = pb.ChatResponse | pb.CompletionResponse

_REASONS = {
    pb.DONE_REASON_STOP: "stop",
    pb.DONE_REASON_LENGTH: "length",
    pb.DONE_REASON_TOOL_CALLS: "stop",
}


def now() -> str:
    """Return the present time, for instance ``2026-12-01T02:03:04.567890Z``."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


class Stopwatch:
    """Times of a request, in nanoseconds."""

    def __init__(self) -> None:
        self._began = time.monotonic_ns()
        self._accepted: int | None = None

    def accept(self) -> None:
        """Note the acceptance of the request, and thus the load of the model."""
        if self._accepted is None:
            self._accepted = time.monotonic_ns()

    @property
    def load_duration(self) -> int:
        """Time from the arrival of the request to the acceptance."""
        return 0 if self._accepted is None else self._accepted - self._began

    @property
    def total_duration(self) -> int:
        """Time since the arrival of the request."""
        return time.monotonic_ns() - self._began


class Answer:
    """Translates the messages of one answer.

    Args:
        model: The model's name as requested.
        is_chat: Whether the answer is a message, and not a text.
        stopwatch: The times of the request.
    """

    def __init__(self, model: str, *, is_chat: bool, stopwatch: Stopwatch) -> None:
        self._model = model
        self._is_chat = is_chat
        self._stopwatch = stopwatch
        self._call_count = 0
        self._content: list[str] = []
        self._thinking: list[str] = []
        self._calls: list[dict[str, Any]] = []
        self._logprobs: list[dict[str, Any]] = []

    def part(self, response: Response) -> dict[str, Any] | None:
        """Return the next part of the answer; None if the message has nothing to show."""
        self._add(response)
        if not (response.done or self._content or self._thinking or self._calls or self._logprobs):
            return None
        return self._taken(response)

    def add(self, response: Response) -> dict[str, Any] | None:
        """Collect a message; return the whole answer after the last one."""
        self._add(response)
        return self._taken(response) if response.done else None

    def ended(self, reason: str) -> dict[str, Any]:
        """Return the answer to a request without a prompt.

        Args:
            reason: The action, ``load`` or ``unload``.
        """
        return {**self._body(), "done": True, "done_reason": reason}

    def _add(self, response: Response) -> None:
        if response.content:
            self._content.append(response.content)
        if isinstance(response, pb.ChatResponse):
            if response.reasoning:
                self._thinking.append(response.reasoning)
            self._calls += map(self._call, response.tool_calls)
        self._logprobs += map(_logprob, response.logprobs)

    def _taken(self, response: Response) -> dict[str, Any]:
        body = {**self._body(), "done": response.done}
        if self._logprobs:
            body["logprobs"] = self._logprobs
        if response.done:
            body["done_reason"] = _REASONS.get(response.done_reason, "")
            body |= _metrics(response, self._stopwatch)
        self._content, self._thinking, self._calls, self._logprobs = [], [], [], []
        return body

    def _body(self) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self._model, "created_at": now()}
        content, thinking = "".join(self._content), "".join(self._thinking)
        shown: dict[str, Any] = {"thinking": thinking} if thinking else {}
        if not self._is_chat:
            return {**body, "response": content, **shown}
        if self._calls:
            shown["tool_calls"] = self._calls
        return {**body, "message": {"role": "assistant", "content": content, **shown}}

    def _call(self, call: pb.ToolCall) -> dict[str, Any]:
        function = {
            "index": self._call_count,
            "name": call.name,
            "arguments": json.loads(call.arguments or "{}"),
        }
        self._call_count += 1
        return {"id": call.id, "function": function}


def line(value: dict[str, Any]) -> bytes:
    """Return a part of a stream, a line of JSON."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def _metrics(response: Response, stopwatch: Stopwatch) -> dict[str, int]:
    return {
        "total_duration": stopwatch.total_duration,
        "load_duration": stopwatch.load_duration,
        "prompt_eval_count": response.prompt_eval_count,
        "prompt_eval_duration": response.prompt_eval_duration.ToNanoseconds(),
        "eval_count": response.eval_count,
        "eval_duration": response.eval_duration.ToNanoseconds(),
    }


def _logprob(entry: pb.TokenLogprob) -> dict[str, Any]:
    found = _token(entry)
    if entry.top:
        found["top_logprobs"] = [_token(each) for each in entry.top]
    return found


def _token(entry: pb.TokenLogprob | pb.TopLogprob) -> dict[str, Any]:
    return {"token": entry.text, "logprob": entry.logprob, "bytes": list(entry.bytes)}
