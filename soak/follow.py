"""Client side of one soak request: send, read as planned, classify the outcome."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc

from mlxrunner.v1 import runner_pb2 as pb
from soak.records import Answer, Ending, Order
from soak.table import judge, read_failure

if TYPE_CHECKING:
    # Exists only in the type stubs.
    from mlxrunner.v1.runner_pb2_grpc import RunnerServiceAsyncStub

STREAM_SECONDS = 60.0
"""Time limit of a stream, extended by the time that the reader stops."""

_Call = grpc.aio.UnaryStreamCall[pb.CompletionRequest, pb.CompletionResponse]


@dataclass
class Outcome:
    """Outcome of one stream.

    Attributes:
        ending: How the stream ended.
        answer: Text and token ids received.
        problem: Description of a violation; empty if there was none.
        first_seconds: Time from sending the request to the first token.
        queue_seconds: Time in the queue as reported by the server, for finished streams.
        retry_seconds: Retry delay given by a full queue.
    """

    ending: Ending
    answer: Answer
    problem: str = ""
    first_seconds: float | None = None
    queue_seconds: float | None = None
    retry_seconds: float | None = None


class Follower:
    """Client of one stream.

    Args:
        order: The request and the planned behaviour of the client.
        on_tokens: Called with the number of tokens in each message.
    """

    def __init__(self, order: Order, on_tokens: Callable[[int], None]) -> None:
        self._order = order
        self._on_tokens = on_tokens
        self._texts: list[str] = []
        self._ids: list[int] = []
        self._messages = 0
        self._end: pb.CompletionResponse | None = None
        self._is_cancelled = False
        self._sent = 0.0
        self._first: float | None = None
        self._retry: float | None = None

    async def run(self, stub: RunnerServiceAsyncStub) -> Outcome:
        """Send the request and read until the stream ends or the time limit is reached."""
        loop = asyncio.get_running_loop()
        self._sent = loop.time()
        call = stub.Completion(self._order.request, timeout=self._order.deadline_seconds)
        timer = None
        if self._order.cancel_seconds is not None:
            timer = loop.call_later(self._order.cancel_seconds, self._cancel, call)
        try:
            ending, problem = await self._ended(call)
        finally:
            if timer:
                timer.cancel()
            call.cancel()
        return self._outcome(ending, problem)

    async def _ended(self, call: _Call) -> tuple[Ending, str]:
        bound = STREAM_SECONDS + self._order.reader.stop_seconds
        try:
            async with asyncio.timeout(bound):
                await self._read(call)
        except TimeoutError:
            return (
                Ending.STUCK,
                f"stuck: not finished within {bound:.0f} s, {len(self._ids)} tokens received",
            )
        except grpc.aio.AioRpcError as error:
            failure = read_failure(error)
            self._retry = failure.retry_seconds
            return judge(self._order, failure)
        except asyncio.CancelledError:
            # gRPC also raises CancelledError for a cancelled call.
            task = asyncio.current_task()
            if task and task.cancelling():
                raise
        return self._ended_without_error()

    def _ended_without_error(self) -> tuple[Ending, str]:
        if self._end is not None:
            return Ending.DONE, self._violation(self._end)
        if self._is_cancelled:
            return Ending.CANCELLED, ""
        return (
            Ending.FAILED,
            f"the stream ended without a last message, {len(self._ids)} tokens received",
        )

    async def _read(self, call: _Call) -> None:
        order = self._order
        async for message in call:
            self._take(message)
            if self._messages == order.cancel_messages and self._end is None:
                self._cancel(call)
                return
            if order.reader.pause_seconds:
                await asyncio.sleep(order.reader.pause_seconds)
            if self._messages == order.reader.stop_after:
                await asyncio.sleep(order.reader.stop_seconds)

    def _take(self, message: pb.CompletionResponse) -> None:
        self._messages += 1
        self._texts.append(message.content)
        self._ids.extend(message.token_ids)
        self._on_tokens(len(message.token_ids))
        if message.token_ids and self._first is None:
            self._first = asyncio.get_running_loop().time() - self._sent
        if message.done:
            self._end = message

    def _violation(self, end: pb.CompletionResponse) -> str:
        """Describe a violation by a finished stream; return an empty string if there is none."""
        options = self._order.request.options
        if self._order.expected_reason:
            return f"served instead of rejected with {self._order.expected_reason}"
        if end.eval_count != len(self._ids) or end.eval_count > options.num_predict:
            received = f"{len(self._ids)} of {options.num_predict} tokens received"
            return f"eval_count {end.eval_count}, but {received}"
        if end.done_reason not in (pb.DONE_REASON_STOP, pb.DONE_REASON_LENGTH):
            return f"done_reason {end.done_reason}"
        if any(stop in "".join(self._texts) for stop in options.stop):
            return "the text contains a stop string"
        return ""

    def _cancel(self, call: _Call) -> None:
        if self._end is None:
            self._is_cancelled = True
            call.cancel()

    def _outcome(self, ending: Ending, problem: str) -> Outcome:
        answer = Answer("".join(self._texts), tuple(self._ids))
        queued = self._end.queue_duration.ToNanoseconds() / 1e9 if self._end else None
        return Outcome(ending, answer, problem, self._first, queued, self._retry)
