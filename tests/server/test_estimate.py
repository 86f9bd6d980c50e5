"""Estimate over the wire: the memory a load would need, computed without loading."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from mlxrunner.v1 import runner_pb2 as pb
from runner_common.memory.headroom import MINIMUM_VARIABLE, OVERHEAD_VARIABLE
from runner_common.memory.need_query import (
    NeedAnswer,
    NeedRefusedError,
    NeedRequest,
    NeedUnknownError,
)
from runner_common.memory.reservations import ReservationBook
from runner_server.host.machine_admission import MachineAdmission
from support.fakes import FakeBackend
from support.harness import Server, StartServer, eventually, failure, running, tokens
from support.need_process import GIB, NEED, STORED, FakeNeedProcess, free

PARTS = (
    "weight_bytes",
    "kv_bytes",
    "prefix_cache_bytes",
    "working_bytes",
    "process_bytes",
    "load_transient_bytes",
)


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> FakeNeedProcess:
    counter = FakeNeedProcess()
    monkeypatch.setattr("runner_server.api.estimator.ask_need", counter.ask)
    return counter


@pytest.fixture
def start_with_memory(start_server: StartServer, tmp_path: Path) -> Callable[[int], Any]:
    """Factory of servers on a machine with a given free memory, not counting this process."""

    def start(available_bytes: int) -> Any:
        book = ReservationBook(tmp_path / "book")
        admission = MachineAdmission(book, measure=lambda: free(available_bytes))
        return start_server(admission=admission)

    return start


@pytest.fixture(autouse=True)
def keep_nothing_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MINIMUM_VARIABLE, "0")
    monkeypatch.setattr("runner_server.host.machine_admission.resident_bytes", lambda: 0)


async def estimate(server: Server, model: Path | str, **fields: Any) -> pb.EstimateResponse:
    request = pb.EstimateRequest(model=str(model), **fields)
    return await server.stub.Estimate(request, timeout=60)


async def test_the_parts_add_up_to_the_total(
    start_with_memory: Callable[[int], Any],
    counter: FakeNeedProcess,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(MINIMUM_VARIABLE, str(GIB))
    monkeypatch.setenv(OVERHEAD_VARIABLE, str(2 * GIB))
    answer = await estimate(
        await start_with_memory(32 * GIB), tmp_path, context_length=100, parallel=3
    )
    parts = [getattr(answer, part) for part in PARTS]
    assert parts == list(NEED.parts.values())
    assert answer.total_bytes == sum(parts)
    assert answer.required_bytes == answer.total_bytes - answer.prefix_cache_bytes
    assert (answer.overhead_bytes, answer.reserved_bytes) == (3 * GIB, 0)
    assert answer.available_bytes == 29 * GIB
    assert (answer.fits, answer.dtype) == (True, "float32")
    assert (answer.context_length, answer.parallel, list(answer.notes)) == (100, 3, [])
    asked = NeedRequest(str(tmp_path), context_length=100, parallel=3)
    assert counter.requests == [asked]


async def test_every_field_reaches_the_process(
    server: Server, counter: FakeNeedProcess, tmp_path: Path
) -> None:
    await estimate(
        server,
        tmp_path,
        dtype=pb.DTYPE_BFLOAT16,
        memory_limit_bytes=7,
        prefix_cache_bytes=0,
        draft_model=str(tmp_path),
    )
    asked = NeedRequest(
        str(tmp_path),
        dtype="bfloat16",
        memory_limit_bytes=7,
        prefix_cache_bytes=0,
        draft_path=str(tmp_path),
    )
    assert counter.requests == [asked]


@pytest.mark.usefixtures("counter")
async def test_a_model_fits_to_the_last_byte(
    start_with_memory: Callable[[int], Any], tmp_path: Path
) -> None:
    exact = await estimate(await start_with_memory(NEED.required_bytes), tmp_path)
    assert (exact.fits, exact.available_bytes) == (True, NEED.required_bytes)
    short = await estimate(await start_with_memory(NEED.required_bytes - 1), tmp_path)
    assert (short.fits, short.required_bytes) == (False, NEED.required_bytes)


@pytest.mark.usefixtures("counter")
async def test_memory_kept_free_is_not_available(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MINIMUM_VARIABLE, str(2**60))
    answer = await estimate(server, tmp_path)
    assert (answer.fits, answer.available_bytes) == (False, 0)
    assert answer.overhead_bytes == 2**60


async def test_a_missing_model_is_not_found(server: Server, counter: FakeNeedProcess) -> None:
    for model in ("/no/such/place", "org/not-in-the-cache"):
        problem = await failure(estimate(server, model))
        assert (problem.code, problem.reason) == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")
        assert problem.metadata == {"model": model}
    assert not counter.requests


async def test_models_outside_the_root_are_not_found(
    start_server: StartServer, counter: FakeNeedProcess, tmp_path: Path
) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "model").mkdir(parents=True)
    outside.mkdir()
    server = await start_server(model_root=root)
    answers = set()
    for model in (str(outside), "/no/such/place", f"{root}/../outside"):
        problem = await failure(estimate(server, model))
        assert problem.reason == "MODEL_NOT_FOUND"
        assert "--model-root" in problem.message
        answers.add(problem.message.replace(repr(model), ""))
    assert len(answers) == 1
    assert not counter.requests
    assert (await estimate(server, root / "model")).total_bytes


async def test_the_stored_format_is_used_if_float32_does_not_fit(
    start_with_memory: Callable[[int], Any], counter: FakeNeedProcess, tmp_path: Path
) -> None:
    roomy = await estimate(
        await start_with_memory(32 * GIB), tmp_path, dtype=pb.DTYPE_AUTO_OR_STORED
    )
    assert (roomy.dtype, roomy.fits, list(roomy.notes)) == ("float32", True, [])
    server = await start_with_memory(8 * GIB)
    answer = await estimate(server, tmp_path, dtype=pb.DTYPE_AUTO_OR_STORED)
    assert (answer.dtype, answer.fits) == ("as_stored", True)
    assert answer.weight_bytes == STORED.weight_bytes
    assert list(answer.notes) == [
        "there is too little memory for float32: it would be held as stored"
    ]
    plain = await estimate(server, tmp_path, dtype=pb.DTYPE_AUTO)
    assert (plain.dtype, plain.fits, list(plain.notes)) == ("float32", False, [])
    assert [request.dtype for request in counter.requests] == ["auto", "auto", "as_stored", "auto"]


async def test_the_stored_format_is_used_if_float32_exceeds_the_requested_limit(
    start_with_memory: Callable[[int], Any], counter: FakeNeedProcess, tmp_path: Path
) -> None:
    numbers = {"requiredBytes": "9", "availableBytes": "7"}
    counter.errors["auto"] = NeedRefusedError("INSUFFICIENT_MEMORY", "too large", numbers, [])
    server = await start_with_memory(32 * GIB)
    limit = {"memory_limit_bytes": 7}
    answer = await estimate(server, tmp_path, dtype=pb.DTYPE_AUTO_OR_STORED, **limit)
    assert (answer.dtype, answer.fits, len(answer.notes)) == ("as_stored", True, 1)
    problem = await failure(estimate(server, tmp_path, **limit))
    assert problem.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (problem.reason, problem.metadata) == ("INSUFFICIENT_MEMORY", numbers)


async def test_there_is_no_note_if_the_stored_format_is_the_default(
    start_with_memory: Callable[[int], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Give no note on Metal and CUDA, where weights are kept as stored anyway."""
    usual = NeedAnswer(NEED, "as_stored", 4096, 32768, 4)
    monkeypatch.setattr("runner_server.api.estimator.ask_need", lambda *_: usual)
    answer = await estimate(await start_with_memory(GIB), tmp_path, dtype=pb.DTYPE_AUTO_OR_STORED)
    assert (answer.fits, answer.dtype, list(answer.notes)) == (False, "as_stored", [])


async def test_refusals_are_the_same_as_for_a_load(
    server: Server, counter: FakeNeedProcess, tmp_path: Path
) -> None:
    where = {"model": str(tmp_path)}
    counter.errors["auto"] = NeedRefusedError("MODEL_UNSUPPORTED", "no config.json", where, [])
    problem = await failure(estimate(server, tmp_path))
    assert problem.code is grpc.StatusCode.FAILED_PRECONDITION
    assert (problem.reason, problem.metadata) == ("MODEL_UNSUPPORTED", where)
    assert problem.message == "no config.json"
    violations = [("context_length", "9999 is more than the 2048 tokens")]
    counter.errors["auto"] = NeedRefusedError("INVALID_FIELD", "x", {}, violations)
    assert (await failure(estimate(server, tmp_path))).violations == dict(violations)


async def test_a_crashed_estimate_hides_its_traceback(
    server: Server, counter: FakeNeedProcess, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    counter.errors["auto"] = NeedUnknownError("ended with exit code 1: Traceback /secret/file.py")
    problem = await failure(estimate(server, tmp_path))
    assert (problem.code, problem.reason) == (grpc.StatusCode.INTERNAL, "GENERATION_FAILED")
    assert "secret" not in problem.message
    assert "Traceback" not in problem.message
    assert "/secret/file.py" in caplog.text
    assert (await server.status()).last_error == ""


async def test_estimates_do_not_hold_up_a_loaded_model(
    loaded: Server, counter: FakeNeedProcess, tmp_path: Path
) -> None:
    """Run many slow estimates: steps and tokenizers are not held up."""
    counter.gate.shut()
    calls = [asyncio.ensure_future(estimate(loaded, tmp_path)) for _ in range(40)]
    await loaded.thread(counter.gate.wait_arrival)
    before = await loaded.status()
    assert len(tokens(await loaded.complete(num_predict=3))) == 3
    answer = await loaded.stub.Tokenize(pb.TokenizeRequest(content="abc"), timeout=10)
    assert len(answer.token_ids) == 3
    counter.gate.open()
    assert len({call.total_bytes for call in await asyncio.gather(*calls)}) == 1
    status = await loaded.status()
    assert (status.state, status.model) == (pb.STATE_ACTIVE, before.model)
    names = [name for name, _ in loaded.backend.calls]
    assert [name for name in names if name != "trim"] == ["open", "release", "load"]


async def test_an_estimate_loads_and_reserves_nothing(
    start_with_memory: Callable[[int], Any], counter: FakeNeedProcess, tmp_path: Path
) -> None:
    server = await start_with_memory(32 * GIB)
    assert (await estimate(server, tmp_path)).fits
    assert counter.requests
    status = await server.status()
    assert (status.state, status.memory, status.memory_usage.reserved_bytes) == (
        pb.STATE_IDLE,
        0,
        0,
    )
    assert "load" not in [name for name, _ in server.backend.calls]
    with ReservationBook(tmp_path / "book").locked() as view:
        assert not view.records()


async def test_an_estimate_is_refused_while_the_runner_stops(
    loaded: Server, counter: FakeNeedProcess, tmp_path: Path
) -> None:
    loaded.app.engine.stop()
    problem = await failure(estimate(loaded, tmp_path))
    assert (problem.code, problem.reason) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
    assert not counter.requests


async def test_a_running_estimate_ends_when_the_runner_stops(
    server: Server, counter: FakeNeedProcess, tmp_path: Path
) -> None:
    counter.gate.shut()
    calls = [asyncio.ensure_future(failure(estimate(server, tmp_path))) for _ in range(4)]
    await server.thread(counter.gate.wait_arrival)
    # Wait for all: gRPC itself cuts off a call that has not arrived when the server stops.
    await eventually(lambda: len(server.app._estimator._running) == len(calls))
    await server.app.close()
    assert {(await call).reason for call in calls} == {"SHUTTING_DOWN"}
    counter.gate.open()


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer cache of this test alone, so every estimate is computed anew."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.mlx
@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("has_draft_model", [False, True])
async def test_a_load_reserves_the_estimate(
    socket_dir: Path,
    model_dir: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    has_draft_model: bool,
) -> None:
    from runner_server.mlx_backend import MlxBackend

    # Other tests may have imported transformers or NumPy into this process.
    monkeypatch.setattr("runner_server.mlx_backend.planning.measure._IMPORTED_BYTES", {})
    admission = MachineAdmission()
    backend: Any = MlxBackend(admission=admission)
    fields: dict[str, Any] = {"context_length": 256, "parallel": 2}
    if has_draft_model:
        fields["draft_model"] = str(model_dir())
    async with running(socket_dir, backend, admission) as (app, channel, ready):
        server = Server(app, backend, channel, ready)
        answer = await estimate(server, model_dir(), **fields)
        assert answer.fits
        assert answer.total_bytes == sum(getattr(answer, part) for part in PARTS)
        assert (await server.status()).state == pb.STATE_IDLE
        loaded = await server.load(str(model_dir()), **fields)
        held = loaded.model.weight_bytes + loaded.model.draft_model.weight_bytes
        assert held == answer.weight_bytes
        assert loaded.model.dtype == answer.dtype
        usage = (await server.status()).memory_usage
        mlx = (
            answer.weight_bytes + answer.kv_bytes + answer.prefix_cache_bytes + answer.working_bytes
        )
        assert usage.limit_bytes == mlx
        assert usage.reserved_bytes == answer.total_bytes
        assert usage.prefix_cache_limit_bytes == answer.prefix_cache_bytes
        text = await server.text("def main", temperature=0.0, num_predict=5)
        again = await estimate(server, model_dir(), **fields)
        assert again.total_bytes == answer.total_bytes
        assert await server.text("def main", temperature=0.0, num_predict=5) == text
        assert (await server.status()).model == loaded.model


@pytest.mark.mlx
@pytest.mark.usefixtures("own_cache")
async def test_mlx_refuses_models_that_cannot_be_loaded(
    server: Server, model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    problem = await failure(estimate(server, empty))
    assert (problem.reason, problem.metadata) == ("MODEL_UNSUPPORTED", {"model": str(empty)})
    problem = await failure(estimate(server, model_dir(), context_length=9999))
    assert set(problem.violations) == {"context_length"}
    problem = await failure(estimate(server, model_dir(), memory_limit_bytes=1000))
    assert problem.reason == "INSUFFICIENT_MEMORY"
    assert problem.metadata["availableBytes"] == "1000"
    assert int(problem.metadata["requiredBytes"]) > 1000


@pytest.mark.mlx
@pytest.mark.usefixtures("own_cache")
@pytest.mark.skipif(os.uname().sysname != "Linux", reason="as stored is the usual format there")
async def test_a_quantized_model_may_fit_only_as_stored(
    start_server: StartServer, model_dir: Callable[..., Path]
) -> None:
    model = model_dir(quantize_bits=4, hidden_size=256, intermediate_size=512)
    memory = 64 * GIB
    admission = MachineAdmission(measure=lambda: free(memory))
    server = await start_server(FakeBackend(), admission=admission)
    fields: dict[str, Any] = {"context_length": 64, "parallel": 1}
    wide = await estimate(server, model, dtype=pb.DTYPE_AUTO, **fields)
    stored = await estimate(server, model, dtype=pb.DTYPE_AS_STORED, **fields)
    assert stored.required_bytes < wide.required_bytes
    memory = wide.required_bytes - 1
    answer = await estimate(server, model, dtype=pb.DTYPE_AUTO_OR_STORED, **fields)
    assert (answer.fits, answer.dtype) == (True, "as_stored")
    assert answer.weight_bytes == stored.weight_bytes
    assert len(answer.notes) == 1
