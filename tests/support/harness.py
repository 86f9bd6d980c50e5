"""A real server in process, reached over a socket, and helpers for calls."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2
from grpc_status import rpc_status

from mlxrunner.v1 import runner_pb2 as pb
from mlxrunner.v1 import runner_pb2_grpc
from runner_common.contract import ERROR_DOMAIN
from runner_common.handshake import ReadyLine
from runner_server.app import RunnerApp
from runner_server.config import ServerConfig
from runner_server.engine.backend import Backend
from runner_server.engine.thread import EngineThread
from runner_server.host.machine_admission import MachineAdmission
from support.engine_view import EngineView
from support.fakes import DEADLINE_SECONDS, FakeBackend

_T = TypeVar("_T")

CompletionCall = grpc.aio.UnaryStreamCall[pb.CompletionRequest, pb.CompletionResponse]

_numbers = itertools.count(1)

LIMITS = [("grpc.max_receive_message_length", 4 * 2**20)]
"""The default limit of gRPC clients in every language."""


@dataclass(frozen=True)
class Problem:
    """Decoded status of a failed call.

    Attributes:
        detail_bytes: Serialized size of the status with details.
    """

    code: grpc.StatusCode
    message: str
    reason: str
    domain: str
    metadata: dict[str, str]
    violations: dict[str, str]
    retry_seconds: float | None
    detail_bytes: int
    kinds: tuple[str, ...]


def problem_of(error: grpc.RpcError) -> Problem:
    """Decode an error and check the parts required of every error."""
    assert isinstance(error, grpc.aio.AioRpcError)
    status: Any = rpc_status.from_call(error)  # type: ignore[arg-type]  # reads the same attributes
    assert status is not None, f"no details: {error}"
    info, bad, retry = (
        [message for detail in status.details if detail.Unpack(message := kind())]
        for kind in (
            error_details_pb2.ErrorInfo,
            error_details_pb2.BadRequest,
            error_details_pb2.RetryInfo,
        )
    )
    assert len(info) == 1
    assert info[0].domain == ERROR_DOMAIN
    return Problem(
        code=error.code(),
        message=error.details() or "",
        reason=info[0].reason,
        domain=info[0].domain,
        metadata=dict(info[0].metadata),
        violations={v.field: v.description for part in bad for v in part.field_violations},
        retry_seconds=retry[0].retry_delay.ToNanoseconds() / 1e9 if retry else None,
        detail_bytes=status.ByteSize(),
        kinds=tuple(detail.type_url.rpartition(".")[2] for detail in status.details),
    )


async def failure(call: Awaitable[object] | grpc.aio.Call) -> Problem:
    """Await a call, which must fail, and return the decoded error; read a stream to the end."""
    try:
        if isinstance(call, grpc.aio.UnaryStreamCall):
            async for _ in call:
                pass
        else:
            assert isinstance(call, Awaitable)
            await call
    except grpc.aio.AioRpcError as error:
        return problem_of(error)
    raise AssertionError("the call succeeded")


async def eventually(
    condition: Callable[[], bool | Awaitable[bool]], within: float = DEADLINE_SECONDS
) -> None:
    """Wait for a condition by polling."""
    async with asyncio.timeout(within):
        while True:
            met = condition()
            if met if isinstance(met, bool) else await met:
                return
            await asyncio.sleep(0.002)


@dataclass
class Server:
    """A running server and a connected client.

    Attributes:
        backend: Model library of the server.
    """

    app: RunnerApp
    backend: FakeBackend
    channel: grpc.aio.Channel
    ready: ReadyLine

    def __post_init__(self) -> None:
        """Create the stub."""
        self.stub = runner_pb2_grpc.RunnerServiceStub(self.channel)

    @property
    def view(self) -> EngineView:
        """What the engine holds at this moment."""
        return EngineView.of(self.app.engine)

    async def load(self, model: str = "fake", **fields: Any) -> pb.LoadResponse:
        """Load a model."""
        return await self.stub.Load(pb.LoadRequest(model=model, **fields))

    async def status(self) -> pb.StatusResponse:
        """Request the status."""
        return await self.stub.Status(pb.StatusRequest(), timeout=DEADLINE_SECONDS)

    def start(
        self,
        prompt: str = "hello",
        *,
        timeout: float | None = DEADLINE_SECONDS,
        **fields: Any,
    ) -> CompletionCall:
        """Start a completion; ``fields`` are those of the request or of its options, by name."""
        known = pb.CompletionOptions.DESCRIPTOR.fields_by_name
        options = {name: value for name, value in fields.items() if name in known}
        others = {name: value for name, value in fields.items() if name not in known}
        request = pb.CompletionRequest(
            prompt=prompt, options=pb.CompletionOptions(**options), **others
        )
        return self.stub.Completion(request, timeout=timeout)

    async def complete(self, prompt: str = "hello", **kwargs: Any) -> list[pb.CompletionResponse]:
        """Run a completion and return the messages."""
        return [message async for message in self.start(prompt, **kwargs)]

    async def text(self, prompt: str = "hello", **kwargs: Any) -> str:
        """Run a completion and return the text."""
        return joined(await self.complete(prompt, **kwargs))

    async def thread(self, work: Callable[[], _T]) -> _T:
        """Run blocking work outside the event loop."""
        return await asyncio.to_thread(work)

    async def settled(self) -> None:
        """Wait until no completion is left."""
        await eventually(lambda: not self.view.requests)
        await eventually(lambda: not any(executor.rows for executor in self.backend.executors))

    async def health(self, service: str = "") -> int:
        """Return the health of a service as an enum number."""
        request = health_pb2.HealthCheckRequest(service=service)
        check: Any = self.channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        answer = await check(request, timeout=DEADLINE_SECONDS)
        return int(answer.status)

    async def watch_health(self, service: str = "") -> AsyncIterator[int]:
        """Yield the health of a service on every change."""
        request = health_pb2.HealthCheckRequest(service=service)
        watch: Any = self.channel.unary_stream(
            "/grpc.health.v1.Health/Watch",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        async for answer in watch(request, timeout=DEADLINE_SECONDS):
            yield int(answer.status)

    async def assert_nothing_left(self) -> None:
        """Check that completions leave nothing behind.

        Waits for the engine's thread, which removes the rows after their last output is sent.
        """
        with suppress(TimeoutError):
            await eventually(lambda: not self._left())
        assert not self._left()

    def _left(self) -> dict[str, object]:
        view = self.view
        rows = [executor.rows for executor in self.backend.executors if executor.rows]
        held = {"requests": view.requests, "admitted": view.admitted, "waiting": view.waiting}
        return {name: value for name, value in {**held, "rows": rows}.items() if value}


class StartServer(Protocol):
    """Factory of servers for one test."""

    async def __call__(self, backend: FakeBackend | None = None, **config: Any) -> Server:
        """Start a server, which is closed after the test."""
        ...


def joined(messages: list[pb.CompletionResponse]) -> str:
    """Return the text of a stream."""
    return "".join(message.content for message in messages)


def tokens(messages: list[pb.CompletionResponse]) -> list[int]:
    """Return the token ids of a stream."""
    return [id_ for message in messages for id_ in message.token_ids]


def count_rounds(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Start counting the rounds of the engine loop; return a function for the count."""
    return count_calls(monkeypatch, EngineThread, "_take_commands")


def count_calls(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> Callable[[], int]:
    """Start counting calls of a method without arguments; return a function for the count."""
    calls = 0
    method = getattr(owner, name)

    def counting(self: object) -> None:
        nonlocal calls
        calls += 1
        method(self)

    monkeypatch.setattr(owner, name, counting)
    return lambda: calls


@asynccontextmanager
async def running(
    directory: Path, backend: Backend, admission: MachineAdmission | None = None, **config: Any
) -> AsyncIterator[tuple[RunnerApp, grpc.aio.Channel, ReadyLine]]:
    """Run a server on a socket in ``directory``."""
    config.setdefault("listen", f"unix:{directory}/s{next(_numbers)}")
    app = RunnerApp(ServerConfig(**config), backend, admission=admission)
    ready = await app.start()
    try:
        async with grpc.aio.insecure_channel(ready.target, options=LIMITS) as channel:
            yield app, channel, ready
    finally:
        await app.close()
