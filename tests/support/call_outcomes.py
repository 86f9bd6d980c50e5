"""Checks of call outcomes: either success or an error from the error table."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from mlxrunner.v1 import runner_pb2 as pb
from runner_common.contract import SERVICE_NAME
from runner_server.errors import RunnerFault
from support.harness import problem_of
from support.hostile_requests import METHODS, Call

ANSWER_SECONDS = 20.0
"""Time limit for any answer on a busy machine."""

TOO_LARGE = "MESSAGE_TOO_LARGE"
"""Reason for messages which gRPC refuses before the server sees them, without details."""

_TELLTALES = ("Traceback", 'File "', "<class", "Error(", "Exception", " object at 0x")
_METHODS = {method.name: method for method in METHODS}

_ENDLESS = {"WatchStatus"}
"""Streams that run until the caller cancels."""


def _faults(base: type[RunnerFault]) -> Iterator[type[RunnerFault]]:
    for fault in base.__subclasses__():
        yield fault
        yield from _faults(fault)


def _name(fault: type[RunnerFault]) -> str:
    return pb.ErrorReason.Name(fault.reason).removeprefix("ERROR_REASON_")


CODES = {_name(fault): fault.code for fault in _faults(RunnerFault)}
"""Status code of each reason in the error table."""


@dataclass
class Caller:
    """Client for sending raw bytes to rpcs and checking the answers.

    Attributes:
        endings: Number of calls by outcome.
        slowest_seconds: Duration of the slowest call.
    """

    channel: grpc.aio.Channel
    endings: Counter[str] = field(default_factory=Counter)
    slowest_seconds: float = 0.0

    async def send(self, call: Call) -> str:
        """Make a call; return ``OK`` or the reason of the error."""
        name, data = call
        began = time.perf_counter()
        try:
            answers = await self._answers(name, data)
        except grpc.aio.AioRpcError as error:
            ending = reason_of(error)
        else:
            check_answers(name, answers)
            ending = "OK"
        self.slowest_seconds = max(self.slowest_seconds, time.perf_counter() - began)
        self.endings[ending] += 1
        return ending

    async def _answers(self, name: str, data: bytes) -> list[Message]:
        method, path = _METHODS[name], f"/{SERVICE_NAME}/{name}"
        read = GetMessageClass(method.output_type).FromString
        if method.server_streaming:
            stream: Any = self.channel.unary_stream(path, response_deserializer=read)
            call = stream(data, timeout=ANSWER_SECONDS)
            if name in _ENDLESS:
                answers = [await anext(aiter(call))]
                call.cancel()
                return answers
            return [answer async for answer in call]
        unary: Any = self.channel.unary_unary(path, response_deserializer=read)
        return [await unary(data, timeout=ANSWER_SECONDS)]


def reason_of(error: grpc.aio.AioRpcError) -> str:
    """Return the reason of an error, which must be in the error table."""
    text = error.details() or ""
    if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in text:
        return TOO_LARGE
    problem = problem_of(error)
    assert problem.code is CODES.get(problem.reason), problem
    assert problem.message, problem
    assert problem.detail_bytes < 2048, problem
    assert not any(sign in problem.message for sign in _TELLTALES), problem
    if problem.reason == "INVALID_FIELD":
        assert problem.violations, problem
    return problem.reason


def check_answers(name: str, answers: list[Message]) -> None:
    """Check the properties of every successful answer."""
    if name != "Completion":
        return
    parts = [answer for answer in answers if isinstance(answer, pb.CompletionResponse)]
    assert len(parts) == len(answers)
    assert [part.done for part in parts].index(True) == len(parts) - 1
    assert sum(len(part.token_ids) for part in parts) == parts[-1].eval_count
