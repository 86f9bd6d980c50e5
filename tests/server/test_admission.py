"""Requests are admitted while KV memory lasts for the longest outcome of each."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import grpc
import pytest

from mlxrunner.v1 import runner_pb2 as pb
from support.fakes import TOKEN_BYTES, FakeBackend
from support.harness import (
    CompletionCall,
    Server,
    StartServer,
    count_rounds,
    eventually,
    failure,
    tokens,
)

PROMPT = "0123456"
PROMPT_TOKENS = 8
"""Tokens of the prompt, with the one every prompt begins with."""


async def _server(start: StartServer, *, tokens_: int, parallel: int = 4, **config: Any) -> Server:
    """Start a server with KV memory for ``tokens_`` tokens."""
    server = await start(FakeBackend(kv_budget_bytes=tokens_ * TOKEN_BYTES), **config)
    await server.load(parallel=parallel)
    return server


def _start(server: Server, length: int, **options: Any) -> CompletionCall:
    """Start a completion of at most ``length`` tokens, prompt and answer."""
    return server.start(PROMPT, num_predict=length - PROMPT_TOKENS, **options)


async def _start_all(server: Server, *lengths: int) -> list[CompletionCall]:
    """Start completions in this order while the engine's first step is held."""
    calls = []
    for length in lengths:
        count = server.view.request_count
        calls.append(_start(server, length))
        await eventually(lambda: server.view.request_count == count + 1)  # noqa: B023 - awaited
    return calls


async def _pass_one_step(server: Server) -> None:
    """Let one more step pass, in which the engine admits new requests."""
    gate = server.backend.step_gate
    await server.thread(gate.wait_arrival)
    passed = gate._passed
    gate.allow()
    await server.thread(partial(gate.wait_passed, passed + 1))
    await server.thread(gate.wait_arrival)


async def _length(call: CompletionCall) -> int:
    return len(tokens([message async for message in call]))


async def test_requests_over_the_budget_wait_and_are_served_later(
    start_server: StartServer,
) -> None:
    server = await _server(start_server, tokens_=100)
    server.backend.step_gate.shut()
    calls = await _start_all(server, 50, 50, 50, 20)
    await _pass_one_step(server)
    status = await server.status()
    # Two of fifty fit; the small one would fit too, but keeps its place in the queue.
    assert (status.running_count, status.queued_count) == (2, 2)
    assert len(server.backend.executors[-1].rows) == 2
    server.backend.step_gate.open()
    assert await asyncio.gather(*map(_length, calls)) == [42, 42, 42, 12]
    await server.settled()
    await server.assert_nothing_left()


async def test_every_row_counts_as_long_as_the_longest(start_server: StartServer) -> None:
    server = await _server(start_server, tokens_=100)
    server.backend.step_gate.shut()
    calls = await _start_all(server, 60, 20)
    await _pass_one_step(server)
    assert (await server.status()).running_count == 1
    server.backend.step_gate.open()
    assert await asyncio.gather(*map(_length, calls)) == [52, 12]


async def test_requests_are_admitted_in_order_of_arrival(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = await _server(start_server, tokens_=60, parallel=8)
    executor: Any = server.backend.executors[-1]
    begun: list[int] = []
    most = 0
    add = executor.add

    def adding(row: int, *rest: Any) -> None:
        nonlocal most
        add(row, *rest)
        begun.append(row)
        most = max(most, len(executor.rows))

    monkeypatch.setattr(executor, "add", adding)
    server.backend.step_gate.shut()
    calls = await _start_all(server, *[60, 10, 30, 20, 60, 12, 12, 12, 9, 9] * 2)
    order = [request.id for request in server.view.requests]
    server.backend.step_gate.open()
    await asyncio.gather(*map(_length, calls))
    assert begun == order
    assert 3 <= most <= 5


async def test_a_request_that_can_never_fit_is_refused_with_both_numbers(
    start_server: StartServer,
) -> None:
    server = await _server(start_server, tokens_=100)
    problem = await failure(_start(server, 101))
    assert problem.code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert problem.reason == "INSUFFICIENT_MEMORY"
    assert problem.metadata["requiredBytes"] == str(101 * TOKEN_BYTES)
    assert problem.metadata["availableBytes"] == str(100 * TOKEN_BYTES)
    # The message gives the numbers and advice.
    assert "101 tokens" in problem.message
    assert "num_predict" in problem.message
    await server.assert_nothing_left()
    assert await _length(_start(server, 100)) == 92


async def test_a_request_that_can_never_fit_is_refused_at_once(start_server: StartServer) -> None:
    server = await _server(start_server, tokens_=100)
    gate = server.backend.step_gate
    gate.shut()
    calls = await _start_all(server, 100, 100)
    # The engine makes no step meanwhile.
    assert (await failure(_start(server, 101))).reason == "INSUFFICIENT_MEMORY"
    await _pass_one_step(server)
    status = await server.status()
    assert (status.running_count, status.queued_count) == (1, 1)
    gate.open()
    assert await asyncio.gather(*map(_length, calls)) == [92, 92]


async def test_without_num_predict_a_request_counts_as_the_whole_context(
    start_server: StartServer,
) -> None:
    server = await _server(start_server, tokens_=4096)
    server.backend.step_gate.shut()
    calls = [server.start(PROMPT), server.start(PROMPT)]
    await eventually(lambda: server.view.request_count == 2)
    await _pass_one_step(server)
    assert (await server.status()).running_count == 1
    server.backend.step_gate.open()
    assert await asyncio.gather(*map(_length, calls)) == [4096 - PROMPT_TOKENS] * 2


async def test_a_queue_for_memory_is_bounded_too(
    start_server: StartServer,
) -> None:
    """Memory for one request at a time fills the queue even with four slots."""
    server = await _server(start_server, tokens_=100, max_queued=3)
    server.backend.step_gate.shut()
    calls = await _start_all(server, *[100] * 7)
    problem = await failure(_start(server, 100))
    assert (problem.code, problem.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
    assert problem.retry_seconds is not None
    assert 0.1 <= problem.retry_seconds <= 60
    server.backend.step_gate.open()
    assert await asyncio.gather(*map(_length, calls)) == [92] * 7


@pytest.mark.parametrize("index", [0, 1, 2])
async def test_a_cancelled_request_makes_room(start_server: StartServer, index: int) -> None:
    """Cancel a running or a queued request; one at the head of the queue blocks the others."""
    server = await _server(start_server, tokens_=100)
    server.backend.step_gate.shut()
    calls = await _start_all(server, 60, 100, 100, 40)
    await _pass_one_step(server)
    cancelled = calls.pop(index)
    lengths = [52, 92, 92, 32]
    del lengths[index]
    cancelled.cancel()
    await eventually(lambda: server.view.command_count > 0)
    server.backend.step_gate.open()
    assert await asyncio.gather(*map(_length, calls)) == lengths
    await server.settled()
    await server.assert_nothing_left()


async def test_an_unload_ends_requests_that_wait_for_memory(start_server: StartServer) -> None:
    server = await _server(start_server, tokens_=100)
    server.backend.step_gate.shut()
    calls = await _start_all(server, 100, 100, 100)
    await server.thread(server.backend.step_gate.wait_arrival)
    unload = asyncio.ensure_future(server.stub.Unload(pb.UnloadRequest()))
    await eventually(lambda: server.view.model_command is not None)
    server.backend.step_gate.open()
    problems = await asyncio.gather(*map(failure, calls))
    assert {problem.reason for problem in problems} == {"SHUTTING_DOWN"}
    await unload
    await server.assert_nothing_left()
    # With three times the memory everything fits.
    server.backend.kv_budget_bytes = 300 * TOKEN_BYTES
    await server.load(parallel=4)
    assert await asyncio.gather(*(_length(_start(server, 100)) for _ in range(3))) == [92] * 3


async def test_a_failed_step_admits_requests_that_wait_for_memory(
    start_server: StartServer,
) -> None:
    server = await _server(start_server, tokens_=100)
    server.backend.step_gate.shut()
    calls = await _start_all(server, 100, 100, 100)
    await _pass_one_step(server)
    server.backend.failures.append(RuntimeError())
    server.backend.step_gate.open()
    assert (await failure(calls[0])).reason == "GENERATION_FAILED"
    assert await asyncio.gather(*map(_length, calls[1:])) == [92, 92]


async def test_the_engine_sleeps_while_nothing_fits(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Preempt a request holding the entire KV budget: the engine sleeps instead of polling."""
    server = await _server(start_server, tokens_=100)
    gate = server.backend.step_gate
    gate.shut()
    (first,) = await _start_all(server, 100)
    await _pass_one_step(server)
    (completion,) = server.view.running
    # The engine notices the slow reader at its next step, and later that the reader caught up.
    monkeypatch.setattr(type(completion.stream), "is_full", property(lambda _stream: True))
    resumes: list[Any] = []
    monkeypatch.setattr(completion.stream, "on_drained", resumes.append)
    others = await _start_all(server, 100, 100, 60)
    gate.open()
    await eventually(lambda: len(server.view.preempted) == 1 and len(server.view.waiting) == 3)
    rounds = count_rounds(monkeypatch)
    steps = server.backend.steps
    for _ in range(30):
        status = await server.status()
        assert (status.running_count, status.queued_count) == (1, 3)
    assert rounds() <= 1
    assert server.backend.steps == steps
    monkeypatch.setattr(type(completion.stream), "is_full", property(lambda _stream: False))
    resumes[0]()
    assert await asyncio.gather(*map(_length, [first, *others])) == [92, 92, 92, 52]
