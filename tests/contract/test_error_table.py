"""The error table of the protocol, row by row, over the wire."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, NoReturn

import grpc
import pytest

from mlxrunner.v1 import runner_pb2 as pb
from runner_server.errors import (
    InsufficientMemory,
    InvalidField,
    ModelNotFound,
    ModelUnsupported,
    RunnerFault,
    to_status,
)
from support.fakes import FakeBackend
from support.harness import Problem, Server, StartServer, eventually, failure

Code = grpc.StatusCode
MAX_DETAIL_BYTES = 2048


def assert_in_table(problem: Problem, code: grpc.StatusCode, reason: str, *keys: str) -> None:
    """Check the properties common to every row of the table."""
    assert (problem.code, problem.reason) == (code, reason)
    assert set(problem.metadata) == set(keys)
    assert problem.message
    assert problem.detail_bytes < MAX_DETAIL_BYTES
    assert "Traceback" not in problem.message
    assert 'File "' not in problem.message
    extra = {"INVALID_FIELD": ("BadRequest",), "QUEUE_FULL": ("RetryInfo",)}
    assert problem.kinds == ("ErrorInfo", *extra.get(reason, ()))


async def test_an_invalid_field_names_every_violation(loaded: Server) -> None:
    problem = await failure(loaded.start(temperature=-1.0, top_k=-1))
    assert_in_table(problem, Code.INVALID_ARGUMENT, "INVALID_FIELD")
    assert set(problem.violations) == {"options.temperature", "options.top_k"}


@pytest.mark.parametrize("count", [16, 17, 100])
async def test_a_prompt_too_long_is_refused_with_its_token_count(
    server: Server, count: int
) -> None:
    await server.load(context_length=16)
    problem = await failure(server.start("x" * (count - 1)))
    assert_in_table(
        problem, Code.INVALID_ARGUMENT, "PROMPT_TOO_LONG", "promptTokens", "contextLength"
    )
    assert problem.metadata == {"promptTokens": str(count), "contextLength": "16"}
    assert str(count) in problem.message
    assert await server.text("x" * 14)


LOAD_FAULTS = [
    (ModelNotFound("nothing at x", model="x"), Code.NOT_FOUND, ("model",)),
    (ModelUnsupported("no model", model="x"), Code.FAILED_PRECONDITION, ("model",)),
    (
        InsufficientMemory("no room", requiredBytes=3 << 30, availableBytes=1 << 30),
        Code.RESOURCE_EXHAUSTED,
        ("requiredBytes", "availableBytes"),
    ),
]


@pytest.mark.parametrize(("fault", "code", "keys"), LOAD_FAULTS)
async def test_a_fault_of_a_load_has_its_row(
    server: Server, fault: RunnerFault, code: grpc.StatusCode, keys: tuple[str, ...]
) -> None:
    server.backend.load_error = fault
    problem = await failure(server.load())
    reason = pb.ErrorReason.Name(fault.reason).removeprefix("ERROR_REASON_")
    assert_in_table(problem, code, reason, *keys)
    assert problem.metadata == fault.metadata
    assert problem.message == str(fault)
    await server.load()


@pytest.mark.parametrize(("fault", "code", "keys"), LOAD_FAULTS)
async def test_a_fault_of_an_estimate_has_its_row(
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    fault: RunnerFault,
    code: grpc.StatusCode,
    keys: tuple[str, ...],
) -> None:
    async def fail(_spec: object) -> NoReturn:
        raise fault

    monkeypatch.setattr(server.app._estimator, "estimate", fail)
    problem = await failure(server.stub.Estimate(pb.EstimateRequest(model="x")))
    reason = pb.ErrorReason.Name(fault.reason).removeprefix("ERROR_REASON_")
    assert_in_table(problem, code, reason, *keys)


@pytest.mark.parametrize("field", ["completion", "tokenize", "detokenize", "render"])
async def test_calls_without_a_model_are_refused(server: Server, field: str) -> None:
    calls: dict[str, Callable[[], Any]] = {
        "completion": server.start,
        "tokenize": lambda: server.stub.Tokenize(pb.TokenizeRequest(content="x")),
        "detokenize": lambda: server.stub.Detokenize(pb.DetokenizeRequest(token_ids=[1])),
        "render": lambda: server.stub.RenderChat(pb.RenderChatRequest()),
    }
    assert_in_table(await failure(calls[field]()), Code.FAILED_PRECONDITION, "MODEL_NOT_LOADED")


async def test_a_load_in_progress_makes_the_server_busy(server: Server) -> None:
    server.backend.load_gate.shut()
    load = asyncio.ensure_future(server.load())
    await server.thread(server.backend.load_gate.wait_arrival)
    for call in (server.load(), server.stub.Trim(pb.TrimRequest())):
        assert_in_table(await failure(call), Code.FAILED_PRECONDITION, "BUSY")
    server.backend.load_gate.open()
    await load


async def test_a_full_queue_refuses_with_a_delay(start_server: StartServer) -> None:
    server = await start_server(max_queued=1)
    await server.load(parallel=1)
    server.backend.step_gate.shut()
    calls = [server.start(), server.start()]
    await eventually(lambda: server.view.request_count == 2)
    problem = await failure(server.start())
    assert_in_table(problem, Code.RESOURCE_EXHAUSTED, "QUEUE_FULL", "queuedCount")
    assert problem.retry_seconds
    for call in calls:
        call.cancel()


async def test_a_stopping_server_refuses_every_call(loaded: Server) -> None:
    loaded.backend.step_gate.shut()
    running = loaded.start()
    await loaded.thread(loaded.backend.step_gate.wait_arrival)
    loaded.app.engine.stop()
    calls: list[Any] = [
        loaded.start(),
        loaded.load(),
        loaded.stub.Estimate(pb.EstimateRequest(model="x")),
        loaded.stub.Trim(pb.TrimRequest()),
        loaded.stub.Unload(pb.UnloadRequest()),
        loaded.stub.Abort(pb.AbortRequest(request_ids=["x"])),
        loaded.stub.Drain(pb.DrainRequest()),
        loaded.stub.Tokenize(pb.TokenizeRequest(content="x")),
        loaded.stub.Detokenize(pb.DetokenizeRequest(token_ids=[1])),
        loaded.stub.RenderChat(pb.RenderChatRequest()),
        loaded.stub.WatchStatus(pb.WatchStatusRequest()),
    ]
    for call in calls:
        assert_in_table(await failure(call), Code.UNAVAILABLE, "SHUTTING_DOWN")
    assert (await loaded.status()).state == pb.STATE_STOPPING
    loaded.backend.step_gate.open()
    assert_in_table(await failure(running), Code.UNAVAILABLE, "SHUTTING_DOWN")


async def test_a_failed_step_hides_its_exception(loaded: Server) -> None:
    loaded.backend.failures.append(RuntimeError("/secret"))
    problem = await failure(loaded.start())
    assert_in_table(problem, Code.INTERNAL, "GENERATION_FAILED")
    assert "/secret" not in problem.message


@pytest.mark.parametrize(
    "rpc",
    ["Load", "Estimate", "Trim", "Unload", "Status", "WatchStatus", "Completion", "Tokenize"],
)
async def test_an_unexpected_exception_is_not_revealed(
    loaded: Server, monkeypatch: pytest.MonkeyPatch, rpc: str
) -> None:
    def broken(*_args: object, **_kwargs: object) -> None:
        raise ZeroDivisionError("password=hunter2 /home/someone/file.py")

    for name in ("load", "trim", "unload", "model", "state", "refuse_when_ending"):
        monkeypatch.setattr(loaded.app.engine, name, broken)
    calls: dict[str, Callable[[], Any]] = {
        "Load": loaded.load,
        "Estimate": lambda: loaded.stub.Estimate(pb.EstimateRequest(model="x")),
        "Trim": lambda: loaded.stub.Trim(pb.TrimRequest()),
        "Unload": lambda: loaded.stub.Unload(pb.UnloadRequest()),
        "Status": loaded.status,
        "WatchStatus": lambda: loaded.stub.WatchStatus(pb.WatchStatusRequest()),
        "Completion": loaded.start,
        "Tokenize": lambda: loaded.stub.Tokenize(pb.TokenizeRequest(content="x")),
    }
    problem = await failure(calls[rpc]())
    assert_in_table(problem, Code.INTERNAL, "GENERATION_FAILED")
    assert "hunter2" not in problem.message
    assert "ZeroDivisionError" not in problem.message


async def test_an_unexpected_exception_in_a_stream_is_not_revealed(
    loaded: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_args: object) -> None:
        raise ZeroDivisionError("hunter2")

    monkeypatch.setattr("runner_server.api.service.delta_message", broken)
    problem = await failure(loaded.start())
    assert_in_table(problem, Code.INTERNAL, "GENERATION_FAILED")
    assert "hunter2" not in problem.message
    await loaded.settled()
    await loaded.assert_nothing_left()


HUGE = "模型" * 2000
FAULTS = [
    ModelNotFound(f"no model at {HUGE}", model=HUGE),
    ModelUnsupported("\0" * 5000, model="\u001b" * 5000),
    ModelUnsupported("\udce4 from a file's name", model="\udce4" * 900),
    ModelNotFound("😀" * 5000, model="a" + "😀" * 5000),
    InvalidField([(f"options.logit_bias[{HUGE}]", HUGE)] * 1000),
    InsufficientMemory(HUGE, requiredBytes=2**62, availableBytes=2**62),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
async def test_details_stay_under_two_kilobytes(server: Server, fault: RunnerFault) -> None:
    assert to_status(fault).ByteSize() < MAX_DETAIL_BYTES
    server.backend.load_error = fault
    problem = await failure(server.load())
    assert problem.code is fault.code
    assert problem.detail_bytes < MAX_DETAIL_BYTES


async def test_thousands_of_violations_are_answered_briefly(loaded: Server) -> None:
    bias = {i + 10_000: 1e9 for i in range(5000)}
    problem = await failure(loaded.start(logit_bias=bias, stop=[""] * 5000))
    assert_in_table(problem, Code.INVALID_ARGUMENT, "INVALID_FIELD")


async def test_status_answers_even_when_the_backend_fails(start_server: StartServer) -> None:
    backend = FakeBackend(open_error=ImportError("no library"))
    server = await start_server(backend)
    await failure(server.load())
    assert (await server.status()).state == pb.STATE_FAILED
