"""Tokens over the wire: wrong, missing and right, by three implementations of gRPC."""

from __future__ import annotations

import asyncio
import base64
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

import support.plain_http2 as plain_http2
from mlxrunner.v1 import runner_pb2 as pb
from mlxrunner.v1 import runner_pb2_grpc
from runner_client import AsyncRunnerClient, AuthenticationError, RunnerClient
from runner_common.contract import ERROR_DOMAIN, HEALTH_SERVICES, TOKEN_VARIABLE
from runner_server.config import ServerConfig, parse_args
from support.harness import Server, StartServer, failure

TOKEN = "correct-horse-battery-staple"  # noqa: S105 - of a test
RIGHT = f"Bearer {TOKEN}"
STATUS = "mlxrunner.v1.RunnerService/Status"
UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED

REFUSED = [
    (),
    ("",),
    ("Bearer",),
    ("Bearer ",),
    (TOKEN,),
    (f"Basic {TOKEN}",),
    ("Bearer wrong-horse-battery-staple",),
    (f"Bearer {TOKEN[:-1]}",),
    (f"Bearer {TOKEN}x",),
    (f"Bearer {TOKEN.upper()}",),
    (RIGHT, RIGHT),
    (RIGHT, "Bearer wrong-horse-battery-staple"),
]


@pytest.fixture
async def guarded(start_server: StartServer) -> Server:
    """A server on a TCP port, requiring the token."""
    return await start_server(listen="127.0.0.1:0", token=TOKEN)


def metadata(values: Sequence[str]) -> tuple[tuple[str, str], ...]:
    return tuple(("authorization", value) for value in values)


def port_of(server: Server) -> int:
    return server.ready.port or 0


async def call_by_hand(
    server: Server, method: str, *values: str, **kwargs: Any
) -> plain_http2.Answer:
    return await asyncio.to_thread(
        plain_http2.call, port_of(server), method, headers=metadata(values), **kwargs
    )


@pytest.mark.parametrize("values", REFUSED)
async def test_every_method_refuses_a_wrong_token(guarded: Server, values: tuple[str, ...]) -> None:
    stub, sent = guarded.stub, metadata(values)
    calls: list[Any] = [
        stub.Load(pb.LoadRequest(model="m"), metadata=sent),
        stub.Estimate(pb.EstimateRequest(model="m"), metadata=sent),
        stub.Trim(pb.TrimRequest(), metadata=sent),
        stub.Unload(pb.UnloadRequest(), metadata=sent),
        stub.Status(pb.StatusRequest(), metadata=sent),
        stub.WatchStatus(pb.WatchStatusRequest(), metadata=sent),
        stub.Completion(pb.CompletionRequest(prompt="x"), metadata=sent),
        stub.Abort(pb.AbortRequest(request_ids=["x"]), metadata=sent),
        stub.Drain(pb.DrainRequest(), metadata=sent),
        stub.Tokenize(pb.TokenizeRequest(content="x"), metadata=sent),
        stub.Detokenize(pb.DetokenizeRequest(token_ids=[1]), metadata=sent),
    ]
    for call in calls:
        problem = await failure(call)
        assert (problem.code, problem.reason) == (UNAUTHENTICATED, "UNAUTHENTICATED")
        assert problem.metadata == {}
        assert problem.kinds == ("ErrorInfo",)
        assert TOKEN not in problem.message
    assert not guarded.backend.executors
    assert (await guarded.stub.Status(pb.StatusRequest(), metadata=metadata([RIGHT]))).pid


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
async def test_with_the_token_everything_works(guarded: Server, scheme: str) -> None:
    sent = metadata([f"{scheme} {TOKEN}"])
    await guarded.stub.Load(pb.LoadRequest(model="m"), metadata=sent)
    call = guarded.stub.Completion(pb.CompletionRequest(prompt="hello"), metadata=sent)
    assert [message async for message in call][-1].done


@pytest.mark.parametrize("values", REFUSED)
async def test_a_wrong_token_over_plain_http2_is_refused(
    guarded: Server, values: tuple[str, ...]
) -> None:
    answer = await call_by_hand(guarded, STATUS, *values)
    assert (answer.headers[":status"], answer.status) == ("200", UNAUTHENTICATED.value[0])
    packed = answer.headers["grpc-status-details-bin"]
    details = status_pb2.Status.FromString(base64.b64decode(packed + "=="))
    info = error_details_pb2.ErrorInfo()
    assert details.details[0].Unpack(info)
    assert (info.domain, info.reason) == (ERROR_DOMAIN, "UNAUTHENTICATED")


@pytest.mark.parametrize(
    "value", [b"Bearer \xff\xfe", b"\x80", b"Bearer \x01", b"Bearer " + b"x" * 4000]
)
async def test_malformed_header_bytes_are_refused(guarded: Server, value: bytes) -> None:
    headers = [("authorization", value)]
    answer = await asyncio.to_thread(plain_http2.call, port_of(guarded), STATUS, headers=headers)
    assert answer.status == UNAUTHENTICATED.value[0]


async def test_the_token_over_plain_http2_is_accepted(guarded: Server) -> None:
    answer = await call_by_hand(guarded, STATUS, RIGHT)
    assert answer.status == 0
    assert pb.StatusResponse.FromString(answer.message).pid


async def test_a_call_is_refused_before_its_request_arrives(guarded: Server) -> None:
    """Refuse before reading the request; strangers cannot make the server read megabytes."""
    answer = await call_by_hand(guarded, STATUS, is_last=False)
    assert answer.status == UNAUTHENTICATED.value[0]


async def test_an_unknown_method_is_refused_alike(guarded: Server) -> None:
    for method in ("mlxrunner.v1.RunnerService/Secret", "nobody.Here/Call"):
        assert (await call_by_hand(guarded, method)).status == UNAUTHENTICATED.value[0]
        answer = await call_by_hand(guarded, method, RIGHT)
        assert answer.status == grpc.StatusCode.UNIMPLEMENTED.value[0]


@pytest.mark.skipif(not shutil.which("grpcurl"), reason="grpcurl is not installed")
@pytest.mark.parametrize(
    ("values", "code"), [((), 80), (("Bearer wrong-horse-battery-staple",), 80), ((RIGHT,), 0)]
)
async def test_grpcurl_needs_the_token(guarded: Server, values: tuple[str, ...], code: int) -> None:
    headers = [part for value in values for part in ("-H", f"authorization: {value}")]
    proto = Path(__file__).parents[2] / "proto"
    how = ["-import-path", str(proto), "-proto", "mlxrunner/v1/runner.proto", "-plaintext"]
    command = ["grpcurl", *how, *headers, guarded.ready.address, STATUS]
    done = await asyncio.to_thread(
        subprocess.run, command, capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == code, done.stderr
    assert ("Code: Unauthenticated" in done.stderr) == bool(code)


@pytest.mark.parametrize("service", HEALTH_SERVICES)
async def test_health_needs_no_token(guarded: Server, service: str) -> None:
    assert await guarded.health(service) == health_pb2.HealthCheckResponse.SERVING
    watch = guarded.watch_health(service)
    assert await anext(watch) == health_pb2.HealthCheckResponse.SERVING


async def test_a_method_that_only_resembles_health_needs_the_token(guarded: Server) -> None:
    for method in ("grpc.health.v1.HealthX/Check", "grpc.health.v1.Health"):
        assert (await call_by_hand(guarded, method)).status == UNAUTHENTICATED.value[0]


@pytest.mark.parametrize("version", ["grpc.reflection.v1", "grpc.reflection.v1alpha"])
async def test_reflection_needs_the_token(guarded: Server, version: str) -> None:
    ask: Any = guarded.channel.stream_stream(
        f"/{version}.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    requests = [reflection_pb2.ServerReflectionRequest(list_services="")]
    # Without a request: grpc.aio fails with an error of its own if it writes to an ended call.
    assert await ask().code() is UNAUTHENTICATED
    answers = [answer async for answer in ask(iter(requests), metadata=metadata([RIGHT]))]
    assert answers[0].list_services_response.service


@pytest.mark.parametrize("token", [None, "wrong-horse-battery-staple"])
async def test_both_clients_raise_authentication_error(guarded: Server, token: str | None) -> None:
    async with AsyncRunnerClient(guarded.ready.target, token=token) as client:
        with pytest.raises(AuthenticationError, match="authorization: Bearer") as caught:
            await client.status()
        with pytest.raises(AuthenticationError):
            await client.load("m")
        with pytest.raises(AuthenticationError):
            await client.complete("x")
        assert await client.is_serving()
    assert (caught.value.reason, caught.value.code) == ("UNAUTHENTICATED", UNAUTHENTICATED)

    def blocking() -> None:
        with RunnerClient(guarded.ready.target, token=token) as client:
            for call in (client.status, client.unload, lambda: client.complete("x")):
                with pytest.raises(AuthenticationError, match="authorization: Bearer"):
                    call()
            with pytest.raises(AuthenticationError):
                client.load("m")
            assert client.is_serving()

    await asyncio.to_thread(blocking)


async def test_both_clients_send_the_token_with_every_call(guarded: Server) -> None:
    async with AsyncRunnerClient(guarded.ready.target, token=TOKEN) as client:
        await client.load("m")
        assert (await client.complete("hello")).content
        assert await client.detokenize(await client.tokenize("hello")) == "hello"

    def blocking() -> None:
        with RunnerClient(guarded.ready.target, token=TOKEN) as client:
            client.unload()
            client.load("m")
            assert client.complete("hello").content
            assert client.detokenize(client.tokenize("hello")) == "hello"
            assert TOKEN not in repr(client) + repr(vars(client))

    await asyncio.to_thread(blocking)


async def test_a_server_without_a_token_ignores_the_header(server: Server) -> None:
    for values in ((), ("Bearer anything",)):
        assert (await server.stub.Status(pb.StatusRequest(), metadata=metadata(values))).pid


async def test_the_token_is_compared_in_constant_time(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def digest(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return one == other

    monkeypatch.setattr("runner_common.serving.auth.hmac.compare_digest", digest)
    server = await start_server(token=TOKEN)
    stub = runner_pb2_grpc.RunnerServiceStub(server.channel)
    await stub.Status(pb.StatusRequest(), metadata=metadata([RIGHT]))
    assert compared == [(TOKEN.encode(), TOKEN.encode())]


@pytest.mark.parametrize("token", ["", "a\nb", "a b", "tökën", "a\x00b"])
def test_a_client_refuses_a_token_that_cannot_be_sent(token: str) -> None:
    with pytest.raises(ValueError, match="visible ASCII") as caught:
        RunnerClient("127.0.0.1:1", token=token)
    assert not token or token not in str(caught.value)


def test_the_token_comes_from_a_file_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "token"
    file.write_text("from-a-file-0123456789\n")
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    assert parse_args([]).token == TOKEN
    # Reading the variable removes it, so that children of the server do not inherit the token.
    assert parse_args([]).token is None
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    assert parse_args(["--token-file", str(file)]).token == "from-a-file-0123456789"  # noqa: S105 - of a test
    assert parse_args([]).token is None


@pytest.mark.parametrize(
    "content", ["", " \n", "short", "two\nlines-of-a-token", "some words of a token", "tökën" * 5]
)
def test_an_unusable_token_ends_the_start(
    content: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "token"
    file.write_text(content)
    with pytest.raises(SystemExit):
        parse_args(["--token-file", str(file)])
    monkeypatch.setenv(TOKEN_VARIABLE, content)
    with pytest.raises(SystemExit):
        parse_args([])
    said = capsys.readouterr().err
    assert "16 or more" in said
    assert not content.strip() or content.strip() not in said


def test_the_token_cannot_be_an_argument(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for argv in (["--token", TOKEN], [f"--token={TOKEN}"]):
        with pytest.raises(SystemExit):
            parse_args(argv)
    with pytest.raises(SystemExit):
        parse_args(["--token-file", str(tmp_path / "none")])
    assert "No such file" in capsys.readouterr().err
    assert TOKEN not in repr(ServerConfig(token=TOKEN))
