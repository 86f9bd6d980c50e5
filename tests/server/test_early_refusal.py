"""A Load that could not succeed is refused while the loaded model runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from mlxrunner.v1 import runner_pb2 as pb
from runner_common.memory.headroom import MINIMUM_VARIABLE, OVERHEAD_VARIABLE
from runner_common.memory.need_query import NeedRefusedError, NeedUnknownError
from runner_common.memory.reservations import ReservationBook
from runner_server.engine.commands import Load
from runner_server.host.machine_admission import MachineAdmission
from support.harness import Server, StartServer, eventually, failure, running, tokens
from support.need_process import GIB, NEED, STORED, FakeNeedProcess, free

DEMO = Path(__file__).parents[2] / "runner_server/demo/model"


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> FakeNeedProcess:
    process = FakeNeedProcess()
    monkeypatch.setattr("runner_server.api.estimator.ask_need", process.ask)
    monkeypatch.setattr("runner_server.host.machine_admission.resident_bytes", lambda: 0)
    monkeypatch.setenv(MINIMUM_VARIABLE, "0")
    return process


@pytest.fixture
def start_loaded(start_server: StartServer, tmp_path: Path) -> Callable[[int], Any]:
    """Factory of servers with a model, on a machine with a given free memory."""

    async def start(available_bytes: int) -> Server:
        book = ReservationBook(tmp_path / "book")
        admission = MachineAdmission(book, measure=lambda: free(available_bytes))
        server = await start_server(admission=admission)
        await server.load()
        return server

    return start


def loads(server: Server) -> int:
    return [name for name, _ in server.backend.calls].count("load")


async def test_a_model_that_does_not_fit_costs_nothing(
    start_loaded: Callable[[int], Any], process: FakeNeedProcess, tmp_path: Path
) -> None:
    server = await start_loaded(NEED.required_bytes - 1)
    call = server.start(num_predict=4000)
    assert await call.read()
    # Otherwise the completion may be over by the time of the status.
    server.backend.step_gate.shut()
    problem = await failure(server.load(str(tmp_path)))
    assert (problem.code, problem.reason) == (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "INSUFFICIENT_MEMORY",
    )
    assert problem.metadata == {
        "requiredBytes": str(NEED.required_bytes),
        "availableBytes": str(NEED.required_bytes - 1),
    }
    assert "stop another runner, or load with a smaller context_length" in problem.message
    status = await server.status()
    assert (status.state, status.model.name, status.running_count) == (pb.STATE_ACTIVE, "fake", 1)
    assert str(tmp_path) in status.last_error
    server.backend.step_gate.open()
    assert await call.read()
    call.cancel()
    assert len(tokens(await server.complete(num_predict=3))) == 3
    assert loads(server) == 1
    assert len(process.requests) == 1


async def test_the_loaded_model_runs_during_the_estimate(
    start_loaded: Callable[[int], Any], process: FakeNeedProcess, tmp_path: Path
) -> None:
    server = await start_loaded(NEED.required_bytes)
    process.gate.shut()
    load = asyncio.ensure_future(server.load(str(tmp_path)))
    await server.thread(process.gate.wait_arrival)
    assert (await server.status()).state == pb.STATE_ACTIVE
    assert len(tokens(await server.complete(num_predict=3))) == 3
    process.gate.open()
    assert (await load).model.name == str(tmp_path)


@pytest.mark.usefixtures("process")
async def test_an_override_is_not_refused(
    start_loaded: Callable[[int], Any], tmp_path: Path
) -> None:
    server = await start_loaded(GIB)
    answer = await server.load(str(tmp_path), memory_override=True)
    assert answer.model.name == str(tmp_path)


async def test_the_stored_format_counts_where_it_may_be_used(
    start_loaded: Callable[[int], Any], process: FakeNeedProcess, tmp_path: Path
) -> None:
    server = await start_loaded(STORED.required_bytes)
    assert (await failure(server.load(str(tmp_path)))).reason == "INSUFFICIENT_MEMORY"
    await server.load(str(tmp_path), dtype=pb.DTYPE_AUTO_OR_STORED)
    assert [request.dtype for request in process.requests] == ["auto", "auto", "as_stored"]


async def test_an_unsupported_model_costs_nothing(
    start_loaded: Callable[[int], Any], process: FakeNeedProcess, tmp_path: Path
) -> None:
    server = await start_loaded(NEED.required_bytes)
    where = {"model": str(tmp_path)}
    process.errors["auto"] = NeedRefusedError("MODEL_UNSUPPORTED", "odd", where, [])
    problem = await failure(server.load(str(tmp_path)))
    assert (problem.reason, problem.message) == ("MODEL_UNSUPPORTED", "odd")
    assert (await server.status()).model.name == "fake"


async def test_without_an_estimate_the_load_goes_on(
    start_loaded: Callable[[int], Any], process: FakeNeedProcess, tmp_path: Path
) -> None:
    server = await start_loaded(NEED.required_bytes)
    process.errors["auto"] = NeedUnknownError("ended with exit code 1")
    assert (await server.load(str(tmp_path))).model.name == str(tmp_path)


async def test_nothing_is_estimated_without_a_loaded_model(
    server: Server, process: FakeNeedProcess, tmp_path: Path
) -> None:
    await server.load(str(tmp_path))
    assert not process.requests


async def test_busy_is_answered_before_the_estimate(
    start_loaded: Callable[[int], Any], process: FakeNeedProcess, tmp_path: Path
) -> None:
    server = await start_loaded(NEED.required_bytes)
    server.backend.load_gate.shut()
    load = asyncio.ensure_future(server.load("other"))
    await server.thread(server.backend.load_gate.wait_arrival)
    assert (await failure(server.load(str(tmp_path)))).reason == "BUSY"
    assert not process.requests
    server.backend.load_gate.open()
    await load


@pytest.mark.parametrize("deadline", [None, 1.0], ids=["cancelled", "deadline"])
async def test_a_load_cancelled_during_its_estimate_leaves_nothing(
    start_loaded: Callable[[int], Any],
    process: FakeNeedProcess,
    tmp_path: Path,
    deadline: float | None,
) -> None:
    server = await start_loaded(NEED.required_bytes)
    reserved = (await server.status()).memory_usage.reserved_bytes
    server.backend.step_gate.shut()
    call = server.start(num_predict=3)
    await server.thread(server.backend.step_gate.wait_arrival)
    process.gate.shut()
    load = server.stub.Load(pb.LoadRequest(model=str(tmp_path)), timeout=deadline)
    await server.thread(process.gate.wait_arrival)
    if deadline is None:
        load.cancel()
    await eventually(lambda: not server.app._estimator._running)
    process.gate.open()
    await server.thread(lambda: process.gate.wait_passed(1))
    status = await server.status()
    assert (status.state, status.model.name, status.running_count) == (pb.STATE_ACTIVE, "fake", 1)
    assert (status.progress, status.last_error) == (100, "")
    assert status.memory_usage.reserved_bytes == reserved
    server.backend.step_gate.open()
    assert len(tokens([message async for message in call])) == 3
    await server.assert_nothing_left()
    assert loads(server) == 1
    assert (await server.load(str(tmp_path))).model.name == str(tmp_path)


async def test_a_load_cancelled_before_it_unloads_keeps_the_model(loaded: Server) -> None:
    loaded.backend.check_gate.shut()
    load = loaded.stub.Load(pb.LoadRequest(model="other", memory_override=True))
    await loaded.thread(loaded.backend.check_gate.wait_arrival)
    call = loaded.start(num_predict=3)
    await eventually(lambda: loaded.view.request_count == 1)
    command = loaded.app.engine._registry._model_command
    assert isinstance(command, Load)
    load.cancel()
    await eventually(command.cancelled.is_set)
    loaded.backend.check_gate.open()
    assert len(tokens([message async for message in call])) == 3
    status = await loaded.status()
    assert (status.state, status.model.name) == (pb.STATE_ACTIVE, "fake")
    assert loads(loaded) == 1


@pytest.mark.mlx
async def test_a_running_completion_of_mlx_survives_a_refused_load(
    socket_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")
    from runner_server.mlx_backend import MlxBackend

    admission = MachineAdmission()
    backend: Any = MlxBackend(admission=admission)
    options: dict[str, Any] = {"seed": 3, "num_predict": 200, "logit_bias": {0: -100.0}}
    async with running(socket_dir, backend, admission) as (app, channel, ready):
        server = Server(app, backend, channel, ready)
        await server.load(str(DEMO))
        alone = tokens(await server.complete("def main", **options))
        call = server.start("def main", **options)
        messages = [await anext(aiter(call))]
        monkeypatch.setenv(OVERHEAD_VARIABLE, str(2**60))
        problem = await failure(server.load(str(DEMO)))
        assert (problem.reason, problem.metadata["availableBytes"]) == ("INSUFFICIENT_MEMORY", "0")
        problem = await failure(server.load(str(DEMO), memory_limit_bytes=1000))
        assert (problem.reason, problem.metadata["availableBytes"]) == (
            "INSUFFICIENT_MEMORY",
            "1000",
        )
        messages += [message async for message in call]
        assert tokens(messages) == alone
        assert tokens(await server.complete("def main", **options)) == alone
        monkeypatch.delenv(OVERHEAD_VARIABLE)
        await server.load(str(DEMO), context_length=64)
        assert (await server.status()).context_length == 64
