"""Trim returns unused memory to the system and ends no request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from mlxrunner.v1 import runner_pb2 as pb
from support.harness import Problem, Server, StartServer, eventually, failure, joined, tokens
from support.server_child import Child
from support.server_child import running as process

LIMIT_BYTES = 100


async def trim(server: Server, **fields: Any) -> int:
    answer = await server.stub.Trim(pb.TrimRequest(**fields), timeout=30)
    return int(answer.freed_bytes)


@pytest.fixture
async def caching(start_server: StartServer) -> Server:
    """A server whose model has a prefix cache."""
    server = await start_server()
    await server.load(prefix_cache_bytes=LIMIT_BYTES)
    server.backend.calls.clear()
    return server


def trims(server: Server) -> int:
    return [name for name, _ in server.backend.calls].count("trim")


def assert_problem(problem: Problem, code: grpc.StatusCode, reason: str) -> None:
    assert (problem.code, problem.reason) == (code, reason)


async def test_the_prefix_cache_shrinks_and_its_limit_is_restored(caching: Server) -> None:
    assert await trim(caching) >= 0
    assert caching.backend.prefix_cache_limits == [0, LIMIT_BYTES]
    await trim(caching, prefix_cache_bytes=30)
    assert caching.backend.prefix_cache_limits[2:] == [30, LIMIT_BYTES]
    assert trims(caching) == 2
    assert {thread for _, thread in caching.backend.calls} == {"engine"}


async def test_a_size_above_the_limit_does_not_raise_it(caching: Server) -> None:
    await trim(caching, prefix_cache_bytes=2**63 - 1)
    assert caching.backend.prefix_cache_limits == [LIMIT_BYTES, LIMIT_BYTES]


async def test_a_limit_lowered_under_memory_pressure_stays(caching: Server) -> None:
    caching.app.engine.limit_prefix_cache(40)
    await trim(caching)
    assert caching.backend.prefix_cache_limits == [40, 0, 40]
    await caching.load(prefix_cache_bytes=LIMIT_BYTES)
    await trim(caching)
    assert caching.backend.prefix_cache_limits[3:] == [0, LIMIT_BYTES]


async def test_trim_works_without_a_model(server: Server) -> None:
    assert await trim(server) >= 0
    assert trims(server) == 1
    assert not server.backend.prefix_cache_limits


@pytest.mark.parametrize("size", [-1, -(2**63)])
async def test_a_negative_size_is_refused(caching: Server, size: int) -> None:
    problem = await failure(trim(caching, prefix_cache_bytes=size))
    assert_problem(problem, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
    assert set(problem.violations) == {"prefix_cache_bytes"}
    assert not trims(caching)


async def test_a_trim_does_not_change_running_completions(caching: Server) -> None:
    alone = await caching.text(seed=7, num_predict=50)
    gate = caching.backend.step_gate
    gate.shut()
    call = caching.start(seed=7, num_predict=50)
    await caching.thread(gate.wait_arrival)
    waiting = asyncio.ensure_future(trim(caching))
    await eventually(lambda: caching.view.command_count == 1)
    assert not waiting.done()
    gate.open()
    await waiting
    assert joined([message async for message in call]) == alone


async def test_a_trim_during_a_load_is_refused(server: Server) -> None:
    gate = server.backend.load_gate
    gate.shut()
    load = asyncio.ensure_future(server.load())
    await server.thread(gate.wait_arrival)
    assert_problem(await failure(trim(server)), grpc.StatusCode.FAILED_PRECONDITION, "BUSY")
    gate.open()
    await load
    await trim(server)


async def test_a_trim_is_refused_while_the_runner_stops(caching: Server) -> None:
    caching.app.engine.stop()
    assert_problem(await failure(trim(caching)), grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")


async def test_waiting_trims_end_when_the_runner_stops(caching: Server) -> None:
    gate = caching.backend.step_gate
    gate.shut()
    call = caching.start()
    await caching.thread(gate.wait_arrival)
    waiting = [asyncio.ensure_future(failure(trim(caching))) for _ in range(3)]
    await eventually(lambda: caching.view.command_count == 3)
    caching.app.engine.stop()
    gate.open()
    for each in waiting:
        assert_problem(await each, grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
    assert (await failure(call)).reason == "SHUTTING_DOWN"


@pytest.mark.parametrize("how", ["dies", "is lost"])
async def test_a_waiting_trim_ends_with_the_engine(caching: Server, how: str) -> None:
    gate = caching.backend.step_gate
    gate.shut()
    call = caching.start()
    await caching.thread(gate.wait_arrival)
    waiting = asyncio.ensure_future(failure(trim(caching)))
    await eventually(lambda: caching.view.command_count == 1)
    if how == "dies":
        caching.backend.trim = _broken  # type: ignore[method-assign]  # the point
        gate.open()
    else:
        caching.app.engine.lose("a rank is gone")
    assert_problem(await waiting, grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
    gate.open()
    await failure(call)


def _broken() -> None:
    raise MemoryError


async def test_a_trim_without_its_caller_leaves_nothing(caching: Server) -> None:
    gate = caching.backend.step_gate
    gate.shut()
    call = caching.start(num_predict=2)
    await caching.thread(gate.wait_arrival)
    waiting = caching.stub.Trim(pb.TrimRequest())
    await eventually(lambda: caching.view.command_count == 1)
    waiting.cancel()
    gate.open()
    assert [message async for message in call][-1].done
    await trim(caching)
    await eventually(lambda: not caching.view.trim_count)
    assert (await caching.status()).state == pb.STATE_ACTIVE


@pytest.fixture(scope="module")
def child(
    model_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Child]:
    """A server process with a model whose KV caches are large compared with the weights."""
    model = model_dir(num_key_value_heads=4, head_dim=512)
    options = ("--parallel", "1", "--context-length", "300", "--prefix-cache-bytes", str(2**26))
    logs = tmp_path_factory.mktemp("logs")
    with process(logs, "--model", str(model), *options) as child:
        child.wait_for(lambda: child.status().state == pb.STATE_ACTIVE)
        yield child


def _complete(child: Child, ids: list[int], count: int = 1) -> list[int]:
    options = pb.CompletionOptions(num_predict=count, temperature=0.0)
    request = pb.CompletionRequest(prompt_token_ids=pb.TokenIds(ids=ids), options=options)
    return tokens(list(child.stub.Completion(request, timeout=60)))


def _fill(child: Child) -> pb.MemoryUsage:
    """Complete prompts without a common prefix, each most of the context long."""
    for first in range(4):
        assert _complete(child, [(first + 7 * i) % 500 for i in range(256)])
    return child.status().memory_usage


@pytest.mark.mlx
def test_a_trim_empties_the_prefix_cache_and_shrinks_the_process(child: Child) -> None:
    said = _complete(child, [5, 6, 7], count=9)
    before = _fill(child)
    assert before.prefix_cache_bytes > 2**24
    freed = child.stub.Trim(pb.TrimRequest(), timeout=30).freed_bytes
    after = child.status().memory_usage
    assert (after.prefix_cache_bytes, after.cache_bytes) == (0, 0)
    assert after.prefix_cache_limit_bytes == before.prefix_cache_limit_bytes == 2**26
    assert after.active_bytes <= before.active_bytes - before.prefix_cache_bytes
    least = before.prefix_cache_bytes // 2
    assert freed > least
    assert after.process_bytes < before.process_bytes - least
    # The server still answers, and caches prompts again.
    assert _complete(child, [5, 6, 7], count=9) == said
    assert _fill(child).prefix_cache_bytes > 2**24


@pytest.mark.mlx
def test_a_trim_can_keep_part_of_the_prefix_cache(child: Child) -> None:
    kept = _fill(child).prefix_cache_bytes // 2
    child.stub.Trim(pb.TrimRequest(prefix_cache_bytes=kept), timeout=30)
    assert 0 < child.status().memory_usage.prefix_cache_bytes <= kept
