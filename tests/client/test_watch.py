"""The watch of both clients: statuses, timeouts, ends, and the command ``status --watch``."""

from __future__ import annotations

import asyncio
import gc
import json
import math
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from mlxrunner.v1 import runner_pb2 as pb
from runner_client import AsyncRunnerClient, RunnerClient, errors
from runner_client.testing import Failure, FakeRunner, fake_runner
from runner_client.types import State, Status, Timeouts
from support.command_line import invoke
from support.fake_child import wait_until
from support.harness import Server, eventually

STOPPING = Failure("SHUTTING_DOWN", "the process is stopping")
SHORT = Timeouts(call_seconds=0.2)


@pytest.fixture
def runner() -> Iterator[FakeRunner]:
    with fake_runner() as fake:
        yield fake


@asynccontextmanager
async def silent_server(folder: Path, messages: int) -> AsyncIterator[str]:
    """Serve watches that go silent after some messages; yield the address."""

    async def answer(_request: bytes, _context: Any) -> AsyncIterator[pb.WatchStatusResponse]:
        for _ in range(messages):
            yield pb.WatchStatusResponse()
        await asyncio.Event().wait()

    method: grpc.RpcMethodHandler[bytes, Any] = grpc.unary_stream_rpc_method_handler(
        answer, response_serializer=pb.WatchStatusResponse.SerializeToString
    )
    server = grpc.aio.server()
    server.add_generic_rpc_handlers(
        (
            grpc.method_handlers_generic_handler(
                "mlxrunner.v1.RunnerService", {"WatchStatus": method}
            ),
        )
    )
    address = f"unix:{folder}/silent"
    server.add_insecure_port(address)
    await server.start()
    yield address
    await server.stop(None)


async def test_changes_arrive_at_an_async_client(runner: FakeRunner) -> None:
    async with (
        AsyncRunnerClient(runner.address) as client,
        client.watch_status() as statuses,
    ):
        assert (await anext(statuses)).state is State.ACTIVE
        runner.model = None
        assert (await anext(statuses)).state is State.IDLE


def test_changes_arrive_at_a_sync_client(runner: FakeRunner) -> None:
    with RunnerClient(runner.address) as client, client.watch_status() as statuses:
        assert next(statuses).state is State.ACTIVE
        runner.model = None
        assert next(statuses).state is State.IDLE


def test_a_load_is_watched_to_its_end(runner: FakeRunner) -> None:
    runner.model, runner.load_seconds = None, 0.3
    with RunnerClient(runner.address) as client:
        statuses = client.watch_status()
        seen = [next(statuses)]
        load = client.start_load("org/name")
        while seen[-1].state is not State.ACTIVE:
            seen.append(next(statuses))
        assert load.wait().model.name == "org/name"
    progress = [status.progress for status in seen if status.state is State.LOADING]
    assert progress == sorted(progress)
    assert progress


def test_the_interval_is_sent_and_kept(runner: FakeRunner) -> None:
    with RunnerClient(runner.address) as client:
        began = time.monotonic()
        statuses = client.watch_status(interval_seconds=0.1)
        assert next(statuses) == next(statuses) == next(statuses)
        assert time.monotonic() - began >= 0.2
        client.watch_status()
    expected = pb.WatchStatusRequest()
    expected.interval.FromMilliseconds(100)
    assert runner.requests[0] == expected


@pytest.mark.parametrize("interval", [0, 0.09, 3600.1, float("nan"), float("inf"), -1])
def test_an_interval_out_of_range_is_refused_by_name(runner: FakeRunner, interval: float) -> None:
    with (
        RunnerClient(runner.address) as client,
        pytest.raises(errors.InvalidRequestError) as caught,
    ):
        client.watch_status(interval_seconds=interval)
    assert [field for field, _ in caught.value.field_violations] == ["interval_seconds"]


def test_an_interval_that_is_no_number_is_refused(runner: FakeRunner) -> None:
    with RunnerClient(runner.address) as client, pytest.raises(TypeError, match="a number"):
        client.watch_status(interval_seconds="1")  # type: ignore[arg-type]  # the test's point


def test_a_stop_ends_a_sync_watch_with_its_reason(runner: FakeRunner) -> None:
    with RunnerClient(runner.address) as client:
        statuses = client.watch_status()
        next(statuses)
        runner.failure = STOPPING
        with pytest.raises(errors.ShuttingDownError):
            next(statuses)


async def test_a_stop_ends_an_async_watch_with_its_reason(runner: FakeRunner) -> None:
    async with AsyncRunnerClient(runner.address) as client:
        statuses = client.watch_status()
        await anext(statuses)
        runner.failure = STOPPING
        with pytest.raises(errors.ShuttingDownError):
            await anext(statuses)


def test_a_cancelled_sync_watch_has_no_more_statuses(runner: FakeRunner) -> None:
    with RunnerClient(runner.address) as client:
        statuses = client.watch_status()
        next(statuses)
        threading.Timer(0.05, statuses.cancel).start()
        assert list(statuses) == []
        assert list(statuses) == []


async def test_a_cancelled_async_watch_has_no_more_statuses(runner: FakeRunner) -> None:
    async with AsyncRunnerClient(runner.address) as client:
        statuses = client.watch_status()
        await anext(statuses)
        asyncio.get_running_loop().call_later(0.05, statuses.cancel)
        assert [status async for status in statuses] == []
        assert [status async for status in statuses] == []


def test_closing_the_client_ends_a_sync_watch(runner: FakeRunner) -> None:
    client = RunnerClient(runner.address)
    statuses = client.watch_status()
    next(statuses)
    threading.Timer(0.05, client.close).start()
    with pytest.raises(errors.RunnerUnavailableError, match="is closed"):
        next(statuses)
    with pytest.raises(errors.RunnerUnavailableError, match="is closed"):
        client.watch_status()


async def test_closing_the_client_ends_an_async_watch(runner: FakeRunner) -> None:
    client = AsyncRunnerClient(runner.address)
    statuses = client.watch_status()
    await anext(statuses)
    waiting = asyncio.ensure_future(anext(statuses))
    await asyncio.sleep(0)
    await client.close()
    with pytest.raises(errors.RunnerUnavailableError, match="is closed"):
        await waiting


@pytest.mark.parametrize(("messages", "phase"), [(0, "call"), (1, "idle")])
async def test_a_silent_runner_times_out(socket_dir: Path, messages: int, phase: str) -> None:
    async with silent_server(socket_dir, messages) as address:
        async with AsyncRunnerClient(address, timeouts=SHORT) as client:
            with pytest.raises(errors.RunnerTimeoutError, match="no status") as caught:
                _ = [status async for status in client.watch_status(interval_seconds=0.1)]
            assert caught.value.phase == phase
        with RunnerClient(address, timeouts=SHORT) as sync:
            statuses = sync.watch_status(interval_seconds=0.1)
            with pytest.raises(errors.RunnerTimeoutError, match="no status") as caught:
                await asyncio.to_thread(list, statuses)
            assert caught.value.phase == phase


async def test_without_an_interval_silence_is_no_fault(socket_dir: Path) -> None:
    async with (
        silent_server(socket_dir, 1) as address,
        AsyncRunnerClient(address, timeouts=SHORT) as client,
    ):
        statuses = client.watch_status()
        await anext(statuses)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(statuses), 3 * SHORT.call_seconds)


async def test_cancelling_the_reader_cancels_the_watch(loaded: Server) -> None:
    watchers = loaded.app.engine._changes._watchers
    async with AsyncRunnerClient(loaded.ready.target) as client:
        statuses = client.watch_status()
        await anext(statuses)
        reader = asyncio.ensure_future(anext(statuses))
        await asyncio.sleep(0)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        await eventually(lambda: not watchers)


async def test_dropping_a_watch_ends_it_on_the_server(loaded: Server) -> None:
    watchers = loaded.app.engine._changes._watchers

    async def glance(client: AsyncRunnerClient) -> Status:
        async for status in client.watch_status():
            return status
        raise AssertionError("no status")

    def glance_sync(client: RunnerClient) -> Status:
        return next(client.watch_status())

    async with AsyncRunnerClient(loaded.ready.target) as client:
        assert (await glance(client)).state is State.ACTIVE
        gc.collect()
        await eventually(lambda: not watchers)
    with RunnerClient(loaded.ready.target) as sync:
        assert (await asyncio.to_thread(glance_sync, sync)).state is State.ACTIVE
        gc.collect()
        await eventually(lambda: not watchers)


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command_prints_a_line_for_each_status(
    runner: FakeRunner, as_json: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner.model, runner.load_seconds = None, math.inf
    reported: list[int] = []
    report = runner.Status

    def recording(request: pb.StatusRequest, context: grpc.ServicerContext) -> pb.StatusResponse:
        status = report(request, context)
        reported.append(status.state)
        return status

    def load_and_stop() -> None:
        with RunnerClient(runner.address) as client:
            wait_until(lambda: pb.STATE_IDLE in reported)
            load = client.start_load("org/name")
            wait_until(lambda: pb.STATE_LOADING in reported)
            load.cancel()
            runner.failure = STOPPING

    monkeypatch.setattr(runner, "Status", recording)
    caller = threading.Thread(target=load_and_stop)
    caller.start()
    result = invoke("status", runner.address, "--watch", *(["--json"] if as_json else []))
    caller.join()
    assert (result.exit_code, result.stderr) == (1, "error: the process is stopping\n")
    first, second = result.stdout.splitlines()[:2]
    if as_json:
        assert [json.loads(line)["state"] for line in (first, second)] == ["idle", "loading"]
    else:
        assert first.endswith("idle, 0 running, 0 queued, 0 B")
        assert "loading, " in second
