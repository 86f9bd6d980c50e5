"""The token for use: five rpcs and reflection, and nothing else."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

import support.plain_http2 as plain_http2
from mlxrunner.v1 import runner_pb2 as pb
from runner_client import AsyncRunnerClient, PermissionDeniedError, RunnerClient, State
from runner_common.contract import SERVICE_NAME, TOKEN_VARIABLE, USE_TOKEN_VARIABLE
from runner_common.serving.auth import USE_METHODS
from runner_server.config import ServerConfig, parse_args
from support.call_outcomes import Caller
from support.harness import Server, StartServer, failure, problem_of
from support.hostile_requests import METHODS

TOKEN = "correct-horse-battery-staple"  # noqa: S105 - of a test
USE_TOKEN = "paper-clip-stapler-of-the-desk"  # noqa: S105 - of a test
USE = (("authorization", f"Bearer {USE_TOKEN}"),)
ALL = (("authorization", f"Bearer {TOKEN}"),)
DENIED = grpc.StatusCode.PERMISSION_DENIED
CONTROL = sorted(method.name for method in METHODS if method.name not in USE_METHODS)


@pytest.fixture
async def guarded(start_server: StartServer) -> Server:
    """A server with both tokens and a model."""
    server = await start_server(listen="127.0.0.1:0", token=TOKEN, use_token=USE_TOKEN)
    await server.stub.Load(pb.LoadRequest(model="m"), metadata=ALL)
    return server


def call_raw(server: Server, name: str, metadata: Any) -> grpc.aio.Call:
    """Call an rpc with an empty request."""
    method = next(each for each in METHODS if each.name == name)
    read = GetMessageClass(method.output_type).FromString
    kind = "unary_stream" if method.server_streaming else "unary_unary"
    stub: Any = getattr(server.channel, kind)(f"/{SERVICE_NAME}/{name}", response_deserializer=read)
    call: grpc.aio.Call = stub(b"", metadata=metadata, timeout=20)
    return call


def test_the_methods_for_use_are_named() -> None:
    """Fail if a later rpc is opened without a decision."""
    assert sorted(USE_METHODS) == [
        *("Chat", "Completion", "Detokenize", "Embed"),
        *("RenderChat", "Status", "Tokenize", "WatchStatus"),
    ]
    assert {method.name for method in METHODS} >= USE_METHODS
    assert {"Load", "Unload", "Trim", "Estimate"} <= set(CONTROL)


@pytest.mark.parametrize("name", CONTROL)
async def test_control_is_refused(guarded: Server, name: str) -> None:
    problem = await failure(call_raw(guarded, name, USE))
    assert (problem.code, problem.reason) == (DENIED, "PERMISSION_DENIED")
    assert problem.kinds == ("ErrorInfo",)
    assert problem.metadata == {}
    for token in (TOKEN, USE_TOKEN):
        assert token not in problem.message
    status = await guarded.stub.Status(pb.StatusRequest(), metadata=USE)
    assert status.model.name == "m"


@pytest.mark.parametrize("name", CONTROL)
async def test_the_token_with_all_rights_still_has_them(guarded: Server, name: str) -> None:
    call: Any = call_raw(guarded, name, ALL)
    outcomes: list[object] = await asyncio.gather(call, return_exceptions=True)
    if isinstance(outcomes[0], grpc.aio.AioRpcError):
        assert problem_of(outcomes[0]).reason == "INVALID_FIELD"


async def test_the_model_can_be_used(guarded: Server) -> None:
    async with AsyncRunnerClient(guarded.ready.target, token=USE_TOKEN) as client:
        assert (await client.complete("hello")).content
        assert await client.detokenize(await client.tokenize("hello")) == "hello"
        assert (await client.status()).state is State.ACTIVE
        async with client.watch_status() as statuses:
            assert (await anext(statuses)).state is State.ACTIVE
        assert await client.is_serving()


async def test_both_clients_raise_permission_denied(guarded: Server) -> None:
    async with AsyncRunnerClient(guarded.ready.target, token=USE_TOKEN) as client:
        for call in (client.load("m"), client.unload(), client.trim(), client.estimate("m")):
            with pytest.raises(PermissionDeniedError, match="all rights") as caught:
                await call
    assert (caught.value.reason, caught.value.code) == ("PERMISSION_DENIED", DENIED)

    def blocking() -> None:
        with (
            RunnerClient(guarded.ready.target, token=USE_TOKEN) as client,
            pytest.raises(PermissionDeniedError),
        ):
            client.unload()

    await asyncio.to_thread(blocking)


@pytest.mark.parametrize(
    "values",
    [
        (f"Bearer {USE_TOKEN[:-1]}",),
        (f"Bearer {USE_TOKEN}x",),
        (f"Bearer {USE_TOKEN}", f"Bearer {TOKEN}"),
        (f"Bearer {TOKEN}{USE_TOKEN}",),
        (),
    ],
)
async def test_other_tokens_are_unauthenticated(guarded: Server, values: tuple[str, ...]) -> None:
    sent = tuple(("authorization", value) for value in values)
    for name in ("Status", "Unload"):
        assert (await failure(call_raw(guarded, name, sent))).reason == "UNAUTHENTICATED"


@pytest.mark.parametrize("version", ["grpc.reflection.v1", "grpc.reflection.v1alpha"])
async def test_reflection_is_open(guarded: Server, version: str) -> None:
    ask: Any = guarded.channel.stream_stream(
        f"/{version}.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    requests = [reflection_pb2.ServerReflectionRequest(list_services="")]
    answers = [answer async for answer in ask(iter(requests), metadata=USE)]
    assert answers[0].list_services_response.service
    assert await guarded.health() == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize(
    "method",
    [
        f"{SERVICE_NAME}/Unload",
        f"{SERVICE_NAME}/Secret",
        f"{SERVICE_NAME}/status",
        f"{SERVICE_NAME}//Status",
        "other.v1.RunnerService/Status",
        "mlx.grpc.engine.MlxEngine/Generate",
        "plugin.GRPCController/Shutdown",
        "grpc.reflectionX/Call",
    ],
)
async def test_control_and_unknown_methods_are_refused_before_the_request(
    guarded: Server, method: str
) -> None:
    answer = await asyncio.to_thread(
        plain_http2.call,
        guarded.ready.port or 0,
        method,
        headers=(("authorization", f"Bearer {USE_TOKEN}"),),
        is_last=False,
    )
    assert answer.status == DENIED.value[0]
    packed = answer.headers["grpc-status-details-bin"]
    details = status_pb2.Status.FromString(base64.b64decode(packed + "=="))
    info = error_details_pb2.ErrorInfo()
    assert details.details[0].Unpack(info)
    assert info.reason == "PERMISSION_DENIED"


async def test_both_tokens_are_compared_in_constant_time_whichever_is_right(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[bytes] = []

    def digest(one: bytes, other: bytes) -> bool:
        compared.append(other)
        return one == other

    monkeypatch.setattr("runner_common.serving.auth.hmac.compare_digest", digest)
    server = await start_server(token=TOKEN, use_token=USE_TOKEN)
    for sent in (ALL, USE):
        compared.clear()
        await server.stub.Status(pb.StatusRequest(), metadata=sent)
        assert compared == [TOKEN.encode(), USE_TOKEN.encode()]


async def test_a_server_without_a_token_for_use_knows_none(start_server: StartServer) -> None:
    server = await start_server(token=TOKEN)
    problem = await failure(server.stub.Status(pb.StatusRequest(), metadata=USE))
    assert problem.reason == "UNAUTHENTICATED"
    caller = Caller(server.channel)
    assert await caller.send(("Status", b"")) == "UNAUTHENTICATED"


def test_the_token_for_use_comes_from_a_file_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "use-token"
    file.write_text("from-a-file-0123456789\n")

    def parse(*arguments: str) -> ServerConfig:
        monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
        return parse_args([*arguments])

    monkeypatch.setenv(USE_TOKEN_VARIABLE, USE_TOKEN)
    config = parse()
    assert (config.token, config.use_token) == (TOKEN, USE_TOKEN)
    assert USE_TOKEN not in repr(config)
    # Reading the variable removes it, so that children of the server do not inherit the token.
    assert parse().use_token is None
    monkeypatch.setenv(USE_TOKEN_VARIABLE, USE_TOKEN)
    assert parse("--use-token-file", str(file)).use_token == "from-a-file-0123456789"  # noqa: S105 - of a test
    assert parse().use_token is None


@pytest.mark.parametrize(
    ("token", "use_token", "said"),
    [
        (None, USE_TOKEN, "needs a token with all rights"),
        (TOKEN, TOKEN, "must differ"),
        (TOKEN, "short", "16 or more"),
        (TOKEN, "", "16 or more"),
    ],
)
def test_unusable_tokens_end_the_start(
    token: str | None,
    use_token: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if token:
        monkeypatch.setenv(TOKEN_VARIABLE, token)
    monkeypatch.setenv(USE_TOKEN_VARIABLE, use_token)
    with pytest.raises(SystemExit):
        parse_args([])
    printed = capsys.readouterr().err
    assert said in printed
    assert not use_token or use_token not in printed
