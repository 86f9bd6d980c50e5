"""Abort and disconnects end one request, never another with the same name."""

from __future__ import annotations

from typing import Any

import pytest

from support.fakes import DEADLINE_SECONDS, FakeBackend
from support.harness import Server, StartServer, failure

pytest.importorskip("smg_grpc_proto", reason="smg-grpc-proto is not installed (the extra smg)")

from smg_grpc_proto import mlx_engine_pb2 as pb
from smg_grpc_proto import mlx_engine_pb2_grpc

from runner_server.api.contracts.names import Names

Message = Any


@pytest.fixture
async def server(start_server: StartServer) -> Server:
    """A loaded server with endless completions."""
    server = await start_server(FakeBackend(), smg=True)
    await server.load(context_length=100_000)
    return server


def stub(server: Server) -> Any:
    return mlx_engine_pb2_grpc.MlxEngineStub(server.channel)


class Reader:
    """Reader of a request; counts the tokens seen."""

    def __init__(self, server: Server, name: str, *, max_tokens: int = 90_000) -> None:
        request = pb.GenerateRequest(
            request_id=name,
            text="x",
            stream=True,
            sampling_params=pb.SamplingParams(max_tokens=max_tokens),
        )
        self.call = stub(server).Generate(request, timeout=DEADLINE_SECONDS)
        self._messages = aiter(self.call)
        self.seen = 0

    async def next(self) -> Message:
        """Return the next message."""
        message = await anext(self._messages)
        self.seen += len(message.chunk.token_ids)
        return message

    async def last(self) -> Message:
        """Read to the end and return the final message."""
        while True:
            message = await self.next()
            if message.HasField("complete"):
                return message.complete


async def started_reader(server: Server, name: str) -> Reader:
    reading = Reader(server, name)
    await reading.next()
    return reading


async def abort(server: Server, *names: str) -> None:
    await stub(server).Abort(pb.AbortRequest(request_ids=names), timeout=DEADLINE_SECONDS)


async def test_abort_ends_only_the_request_of_that_name(server: Server) -> None:
    one, other = await started_reader(server, "one"), await started_reader(server, "other")
    await abort(server, "nobody", "one")
    end = await one.last()
    assert (end.finish_reason, end.completion_tokens) == ("abort", one.seen)
    assert not end.HasField("matched_stop_token_id")
    assert (await other.next()).chunk.token_ids
    other.call.cancel()
    await server.settled()
    await server.assert_nothing_left()


async def test_an_aborted_request_without_stream_gets_its_output_so_far(server: Server) -> None:
    gate = server.backend.step_gate
    gate.shut()
    request = pb.GenerateRequest(request_id="one", text="x")
    call = stub(server).Generate(request, timeout=DEADLINE_SECONDS)
    gate.allow(3)
    await server.thread(gate.wait_arrival)
    await abort(server, "one")
    messages = [message async for message in call]
    assert messages[-1].complete.finish_reason == "abort"
    gate.open()
    await server.settled()


async def test_an_empty_name_aborts_nothing(server: Server) -> None:
    first, second = await started_reader(server, ""), await started_reader(server, "")
    await abort(server, "")
    for reading in (first, second):
        assert (await reading.next()).chunk.token_ids
        reading.call.cancel()
    await server.settled()


async def test_a_name_of_two_requests_aborts_neither(server: Server) -> None:
    first, second = await started_reader(server, "same"), await started_reader(server, "same")
    await abort(server, "same")
    assert (await first.next()).chunk.token_ids
    first.call.cancel()
    # Nor does it abort the remaining one: the other's caller may have sent the abort late.
    await abort(server, "same")
    assert (await second.next()).chunk.token_ids
    second.call.cancel()
    await server.settled()
    await server.assert_nothing_left()


async def test_the_end_of_a_request_leaves_its_namesake_running(server: Server) -> None:
    long = await started_reader(server, "same")
    short = Reader(server, "same", max_tokens=3)
    assert (await short.last()).finish_reason == "length"
    assert (await long.next()).chunk.token_ids
    long.call.cancel()
    await server.settled()


async def test_a_name_can_be_reused_after_the_end(server: Server) -> None:
    for _ in range(2):
        reading = await started_reader(server, "again")
        await abort(server, "again")
        assert (await reading.last()).finish_reason == "abort"
    await server.settled()


async def test_a_disconnected_caller_leaves_nothing(server: Server) -> None:
    reading = await started_reader(server, "one")
    reading.call.cancel()
    await server.settled()
    await server.assert_nothing_left()


async def test_too_many_names_are_refused(server: Server) -> None:
    problem = await failure(stub(server).Abort(pb.AbortRequest(request_ids=["x"] * 1025)))
    assert list(problem.violations) == ["request_ids"]


def test_names_are_dropped_at_the_end() -> None:
    names = Names()
    with names.held("a", lambda: None), names.held("", lambda: None):
        assert names._holders.keys() == {"a"}
    assert not names._holders
