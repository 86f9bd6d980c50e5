"""The queue: order, slots, and the refusal of a full one."""

from __future__ import annotations

import time
from functools import partial

import grpc
import pytest

from support.harness import Server, StartServer, eventually, failure, joined


async def test_a_full_queue_answers_a_retry_delay(start_server: StartServer) -> None:
    server = await start_server(max_queued=3)
    await server.load(parallel=2)
    server.backend.step_gate.shut()
    calls = [server.start(str(i), num_predict=2) for i in range(5)]
    await eventually(lambda: server.view.request_count == 5)
    await server.thread(server.backend.step_gate.wait_arrival)
    problem = await failure(server.start("one too many"))
    assert (problem.code, problem.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
    assert problem.kinds == ("ErrorInfo", "RetryInfo")
    assert problem.retry_seconds is not None
    assert 0.1 <= problem.retry_seconds <= 60
    assert int(problem.metadata["queuedCount"]) >= 3
    server.backend.step_gate.open()
    for call in calls:
        assert [message async for message in call][-1].done
    assert await server.text(num_predict=2)


async def test_the_retry_delay_follows_measurements(start_server: StartServer) -> None:
    server = await start_server(max_queued=4)
    await server.load(parallel=1)
    for _ in range(30):
        await server.complete(num_predict=1)
    server.backend.step_gate.shut()
    calls = [server.start(num_predict=1) for _ in range(5)]
    await eventually(lambda: server.view.request_count == 5)
    problem = await failure(server.start())
    # Measurements have replaced the first guess of one second per completion.
    assert problem.retry_seconds is not None
    assert problem.retry_seconds < 2
    server.backend.step_gate.open()
    for call in calls:
        assert [message async for message in call][-1].done


async def test_requests_are_served_in_order_of_arrival(server: Server) -> None:
    await server.load(parallel=1)
    server.backend.step_gate.shut()
    calls = []
    for i in range(6):
        calls.append(server.start(f"{i}", num_predict=1))
        await eventually(partial(_is_registered_count, server, i + 1))
    order: list[int] = []
    admitted = [request.id for request in server.view.requests]
    server.backend.step_gate.open()
    for i, call in enumerate(calls):
        assert [message async for message in call][-1].done
        order.append(i)
    assert order == list(range(6))
    assert admitted == sorted(admitted)


@pytest.mark.parametrize("parallel", [1, 3, 8])
async def test_there_are_never_more_rows_than_slots(server: Server, parallel: int) -> None:
    await server.load(parallel=parallel)
    server.backend.step_gate.shut()
    calls = [server.start(str(i), num_predict=5, seed=i) for i in range(2 * parallel + 1)]
    await eventually(lambda: server.view.request_count == len(calls))
    most = 0
    finished = False
    while not finished:
        await server.thread(server.backend.step_gate.wait_arrival)
        most = max(most, len(server.backend.executors[-1].rows))
        passed = server.backend.step_gate._passed
        server.backend.step_gate.allow()
        await server.thread(partial(server.backend.step_gate.wait_passed, passed + 1))
        await eventually(
            lambda: server.backend.step_gate._waiting > 0 or not _registered_count(server)
        )
        finished = not _registered_count(server)
    assert most == parallel
    texts = [joined([message async for message in call]) for call in calls]
    assert len(set(texts)) == len(calls)


async def test_queue_duration_is_the_time_in_the_queue(server: Server) -> None:
    await server.load(parallel=1)
    server.backend.step_gate.shut()
    began = time.monotonic()
    first = server.start("a", num_predict=2)
    await server.thread(server.backend.step_gate.wait_arrival)
    admitted = time.monotonic()
    second = server.start("b", num_predict=2)
    await eventually(lambda: server.view.request_count == 2)
    queued = time.monotonic()
    await server.status()
    opened = time.monotonic()
    server.backend.step_gate.open()
    ends = [[message async for message in call][-1] for call in (first, second)]
    ended = time.monotonic()
    waits = [end.queue_duration.ToNanoseconds() / 1e9 for end in ends]
    assert 0 < waits[0] <= admitted - began
    assert opened - queued <= waits[1] <= ended - admitted


def _is_registered_count(server: Server, count: int) -> bool:
    return _registered_count(server) == count


def _registered_count(server: Server) -> int:
    return server.view.request_count
