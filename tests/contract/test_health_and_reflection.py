"""The services beside the runner's: health, and reflection under both names."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from runner_common.contract import HEALTH_SERVICES, SERVICE_NAME
from support.harness import Server, StartServer

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
REFLECTIONS = ["grpc.reflection.v1", "grpc.reflection.v1alpha"]


def test_health_knows_the_names_used_by_clients_and_go_plugin() -> None:
    assert set(HEALTH_SERVICES) == {"", "mlxrunner.v1.RunnerService", "plugin"}


@pytest.mark.parametrize("service", HEALTH_SERVICES)
async def test_health_is_serving_without_a_model(server: Server, service: str) -> None:
    assert await server.health(service) == SERVING


async def test_an_unknown_service_is_not_found(server: Server) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await server.health("nobody")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("service", HEALTH_SERVICES)
async def test_watch_reports_the_drain(start_server: StartServer, service: str) -> None:
    server = await start_server()
    watch = server.watch_health(service)
    assert await anext(watch) == SERVING
    await server.load()
    server.backend.step_gate.shut()
    call = server.start()
    await server.thread(server.backend.step_gate.wait_arrival)
    closing = asyncio.ensure_future(server.app.close())
    assert await anext(watch) == NOT_SERVING
    server.backend.step_gate.open()
    await closing
    with pytest.raises(grpc.aio.AioRpcError):
        [message async for message in call]


async def _reflect(
    server: Server, version: str, *requests: reflection_pb2.ServerReflectionRequest
) -> list[reflection_pb2.ServerReflectionResponse]:
    ask: Any = server.channel.stream_stream(
        f"/{version}.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    return [answer async for answer in ask(iter(requests), timeout=10)]


def _files_in(answer: reflection_pb2.ServerReflectionResponse) -> Sequence[Any]:
    data = answer.file_descriptor_response.file_descriptor_proto
    assert data, answer
    return [descriptor_pb2.FileDescriptorProto.FromString(part) for part in data]


@pytest.mark.parametrize("version", REFLECTIONS)
async def test_reflection_lists_every_service(server: Server, version: str) -> None:
    request = reflection_pb2.ServerReflectionRequest(list_services="*")
    (answer,) = await _reflect(server, version, request)
    names = {service.name for service in answer.list_services_response.service}
    assert names == {
        SERVICE_NAME,
        "grpc.health.v1.Health",
        *(f"{name}.ServerReflection" for name in REFLECTIONS),
    }


SYMBOLS = [
    SERVICE_NAME,
    f"{SERVICE_NAME}.Load",
    "mlxrunner.v1.LoadRequest",
    "mlxrunner.v1.CompletionOptions",
    "mlxrunner.v1.ErrorReason",
]
DETAILS = ["google.rpc.ErrorInfo", "google.rpc.BadRequest", "google.rpc.RetryInfo"]


@pytest.mark.parametrize("version", REFLECTIONS)
@pytest.mark.parametrize("symbol", SYMBOLS)
async def test_reflection_describes_a_symbol(server: Server, version: str, symbol: str) -> None:
    request = reflection_pb2.ServerReflectionRequest(file_containing_symbol=symbol)
    (answer,) = await _reflect(server, version, request)
    assert "mlxrunner/v1/runner.proto" in {file.name for file in _files_in(answer)}


@pytest.mark.parametrize("symbol", DETAILS)
async def test_reflection_describes_the_details_of_errors(server: Server, symbol: str) -> None:
    """Describe the details' types, which grpcurl otherwise shows as bytes."""
    request = reflection_pb2.ServerReflectionRequest(file_containing_symbol=symbol)
    (answer,) = await _reflect(server, "grpc.reflection.v1", request)
    assert "google/rpc/error_details.proto" in {file.name for file in _files_in(answer)}


@pytest.mark.parametrize("version", REFLECTIONS)
@pytest.mark.parametrize(
    "request_",
    [
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE_NAME),
        reflection_pb2.ServerReflectionRequest(file_by_filename="mlxrunner/v1/runner.proto"),
    ],
    ids=["symbol", "file"],
)
async def test_reflection_includes_comments(
    server: Server, version: str, request_: reflection_pb2.ServerReflectionRequest
) -> None:
    """Check for comments, the specification, which generated code drops."""
    (answer,) = await _reflect(server, version, request_)
    file = next(file for file in _files_in(answer) if file.package == "mlxrunner.v1")
    comments = [location.leading_comments for location in file.source_code_info.location]
    assert any(text.startswith(" Loads a model into this process.") for text in comments)
    assert any(" Bytes MLX holds now: active and cache." in text for text in comments)


@pytest.mark.parametrize("version", REFLECTIONS)
async def test_reflection_finds_the_file_by_name(server: Server, version: str) -> None:
    name = "mlxrunner/v1/runner.proto"
    request = reflection_pb2.ServerReflectionRequest(file_by_filename=name)
    (answer,) = await _reflect(server, version, request)
    file = next(file for file in _files_in(answer) if file.name == name)
    assert [service.name for service in file.service] == ["RunnerService"]


@pytest.mark.parametrize("version", REFLECTIONS)
async def test_reflection_refuses_unknown_names(server: Server, version: str) -> None:
    requests = [
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="nobody.Nothing"),
        reflection_pb2.ServerReflectionRequest(file_by_filename="/etc/passwd"),
    ]
    for answer in await _reflect(server, version, *requests):
        assert answer.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]
