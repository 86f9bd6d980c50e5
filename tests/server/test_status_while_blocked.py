"""Status and health answer while the engine's thread is stuck in a step."""

from __future__ import annotations

import asyncio
import time

import pytest
from grpc_health.v1 import health_pb2

from mlxrunner.v1 import runner_pb2 as pb
from support.fakes import ROW_BYTES, WEIGHT_BYTES
from support.harness import Server, eventually


async def test_status_answers_with_a_growing_age(loaded: Server) -> None:
    loaded.backend.step_gate.shut()
    calls = [loaded.start(str(i), num_predict=2) for i in range(6)]
    await loaded.thread(loaded.backend.step_gate.wait_arrival)
    await eventually(lambda: loaded.view.request_count == 6)
    first = await loaded.status()
    assert first.state == pb.STATE_ACTIVE
    assert first.running_count + first.queued_count == 6
    assert first.HasField("last_progress_age")
    second = await loaded.status()
    grown = second.last_progress_age.ToNanoseconds() - first.last_progress_age.ToNanoseconds()
    assert grown > 0
    assert second.step_count == first.step_count
    assert second.memory >= WEIGHT_BYTES + ROW_BYTES
    loaded.backend.step_gate.open()
    for call in calls:
        assert [message async for message in call][-1].done
    assert not (await loaded.status()).HasField("last_progress_age")


async def test_the_age_of_new_work_excludes_idle_time(
    loaded: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protect a healthy runner from a watchdog at the first request after an idle hour."""
    now = time.monotonic
    monkeypatch.setattr(
        "runner_server.engine.health.heartbeat.time.monotonic", lambda: now() + 3600
    )
    loaded.backend.step_gate.shut()
    call = loaded.start(num_predict=1)
    await loaded.thread(loaded.backend.step_gate.wait_arrival)
    assert (await loaded.status()).last_progress_age.ToNanoseconds() < 60e9
    loaded.backend.step_gate.open()
    assert [message async for message in call][-1].done


async def test_health_answers_while_a_step_is_blocked(loaded: Server) -> None:
    loaded.backend.step_gate.shut()
    call = loaded.start()
    await loaded.thread(loaded.backend.step_gate.wait_arrival)
    assert await loaded.health() == health_pb2.HealthCheckResponse.SERVING
    call.cancel()


async def test_tokenize_answers_while_a_step_is_blocked(loaded: Server) -> None:
    loaded.backend.step_gate.shut()
    call = loaded.start()
    await loaded.thread(loaded.backend.step_gate.wait_arrival)
    answer = await loaded.stub.Tokenize(pb.TokenizeRequest(content="abc"), timeout=5)
    assert list(answer.token_ids) == [*b"abc"]
    call.cancel()


async def test_status_answers_while_a_load_is_blocked(server: Server) -> None:
    server.backend.load_gate.shut()
    load = asyncio.ensure_future(server.load())
    await server.thread(server.backend.load_gate.wait_arrival)
    ages = [(await server.status()).last_progress_age.ToNanoseconds() for _ in range(2)]
    assert ages[1] > ages[0]
    server.backend.load_gate.open()
    await load
