"""A user's program for strict type checkers, with the stubs and the library."""

from collections.abc import Iterable
from typing import assert_type

import grpc

from mlxrunner.v1 import runner_pb2 as pb
from mlxrunner.v1 import runner_pb2_grpc
from runner_client import (
    AsyncRunnerProcess,
    Completion,
    CompletionChunk,
    MemoryGate,
    Options,
    QueueFullError,
    RunnerClient,
    RunnerProcess,
)
from runner_common.handshake import ReadyLine


def with_stubs(channel: grpc.Channel) -> str:
    stub = runner_pb2_grpc.RunnerServiceStub(channel)
    status = stub.Status(pb.StatusRequest())
    assert_type(status, pb.StatusResponse)
    assert_type(status.memory_usage.active_bytes, int)
    request = pb.CompletionRequest(prompt="x", options=pb.CompletionOptions(num_predict=3))
    answers: Iterable[pb.CompletionResponse] = stub.Completion(request)
    return "".join(answer.content for answer in answers)


def with_the_library(model: str) -> Completion | float | None:
    gate = MemoryGate(minimum_bytes=1 << 30)
    with RunnerProcess(model, gate=gate, parallel=2) as runner:
        for chunk in runner.completion("x", options=Options(stop=("\n",))):
            assert_type(chunk, CompletionChunk)
        try:
            return runner.complete([1, 2, 3])
        except QueueFullError as error:
            return error.retry_delay_seconds


async def in_asyncio(model: str) -> int:
    async with AsyncRunnerProcess(model) as runner:
        return (await runner.complete("x")).eval_count


def elsewhere(line: str, token: str) -> list[int]:
    with RunnerClient(ReadyLine.parse(line).target, token=token) as client:
        return client.tokenize("x")
