"""Abort: completions end by their request_id, in every phase."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from mlxrunner.v1 import runner_pb2 as pb
from support.fakes import PREFILL_CHUNK
from support.harness import CompletionCall, Problem, Server, eventually, failure, running, tokens

LONG_PROMPT = "p" * (PREFILL_CHUNK * 40)


async def abort(server: Server, *ids: str) -> int:
    answer = await server.stub.Abort(pb.AbortRequest(request_ids=ids), timeout=20)
    return int(answer.aborted_count)


async def end_of(call: CompletionCall) -> Problem:
    """Return the error of a stream after the text that was already on its way."""
    problem = await failure(call)
    assert (problem.code, problem.reason) == (grpc.StatusCode.ABORTED, "ABORTED")
    assert (problem.metadata, problem.kinds) == ({}, ("ErrorInfo",))
    return problem


async def test_a_decoding_completion_ends_and_frees_its_row(loaded: Server) -> None:
    call = loaded.start(request_id="one", num_predict=4000)
    assert await anext(aiter(call))
    assert await abort(loaded, "one") == 1
    problem = await end_of(call)
    assert problem.message == "the request was ended by an Abort; do not retry it automatically"
    await loaded.settled()
    await loaded.assert_nothing_left()
    assert (await loaded.status()).last_error == ""


async def test_the_row_is_free_within_one_step(loaded: Server) -> None:
    gate = loaded.backend.step_gate
    gate.shut()
    call = loaded.start(LONG_PROMPT, request_id="one")
    gate.allow(2)
    assert (await anext(aiter(call))).HasField("prompt_progress")
    await loaded.thread(gate.wait_arrival)
    # The stream ends during the step, which has not returned.
    assert await abort(loaded, "one") == 1
    await end_of(call)
    gate.allow()
    await loaded.settled()
    await loaded.assert_nothing_left()
    assert loaded.backend.steps == 3


async def test_a_queued_completion_ends_and_the_running_one_goes_on(server: Server) -> None:
    await server.load(parallel=1)
    server.backend.step_gate.shut()
    first = server.start(request_id="first", num_predict=30)
    second = server.start(request_id="second")
    await eventually(lambda: server.view.request_count == 2)
    assert await abort(server, "second") == 1
    await end_of(second)
    server.backend.step_gate.open()
    assert len(tokens([message async for message in first])) == 30
    await server.settled()
    await server.assert_nothing_left()


async def test_every_completion_with_an_id_ends_and_no_other(loaded: Server) -> None:
    names = ("same", "same", "other", "")
    calls = [loaded.start(request_id=name, num_predict=4000) for name in names]
    for call in calls:
        assert await anext(aiter(call))
    assert await abort(loaded, "same", "unknown", "same") == 2
    for call in calls[:2]:
        await end_of(call)
    for call in calls[2:]:
        assert await anext(aiter(call))
        call.cancel()
    await loaded.settled()


async def test_an_unknown_or_finished_id_is_not_an_error(loaded: Server) -> None:
    messages = [message async for message in loaded.start(request_id="one", num_predict=2)]
    assert messages[-1].done
    assert await abort(loaded, "one", "unknown") == 0


async def test_nothing_is_aborted_twice(loaded: Server) -> None:
    loaded.backend.step_gate.shut()
    call = loaded.start(request_id="one")
    await loaded.thread(loaded.backend.step_gate.wait_arrival)
    # The engine is in a step, so the row is still there.
    assert [await abort(loaded, "one"), await abort(loaded, "one")] == [1, 0]
    loaded.backend.step_gate.open()
    await end_of(call)


async def test_no_model_is_needed(server: Server) -> None:
    assert await abort(server, "one") == 0


@pytest.mark.parametrize(
    ("ids", "field"),
    [
        ([], "request_ids"),
        (["x"] * 1025, "request_ids"),
        (["x", ""], "request_ids[1]"),
        (["y" * 129], "request_ids[0]"),
    ],
)
async def test_ids_out_of_range_are_refused(server: Server, ids: list[str], field: str) -> None:
    problem = await failure(server.stub.Abort(pb.AbortRequest(request_ids=ids)))
    assert (problem.reason, list(problem.violations)) == ("INVALID_FIELD", [field])


async def test_the_largest_request_is_accepted(loaded: Server) -> None:
    call = loaded.start(request_id="é" * 128, num_predict=4000)
    assert await anext(aiter(call))
    assert await abort(loaded, *(f"{i:0128}" for i in range(1023)), "é" * 128) == 1
    await end_of(call)


@pytest.mark.mlx
async def test_a_row_of_mlx_leaves_its_batch(
    socket_dir: Path, model_dir: Callable[..., Path]
) -> None:
    from runner_server.mlx_backend import MlxBackend

    backend: Any = MlxBackend()
    options: dict[str, Any] = {"seed": 3, "num_predict": 100, "logit_bias": {0: -100.0}}
    async with running(socket_dir, backend) as (app, channel, ready):
        server = Server(app, backend, channel, ready)
        await server.load(str(model_dir()), parallel=2)
        alone = tokens(await server.complete("neighbour", **options))
        neighbour = server.start("neighbour", **options)
        call = server.start("x", request_id="one", num_predict=3000, logit_bias={0: -100.0})
        assert await anext(aiter(call))
        assert await abort(server, "one") == 1
        await end_of(call)
        assert tokens([message async for message in neighbour]) == alone
        await eventually(lambda: not server.view.admitted)
