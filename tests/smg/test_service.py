"""Other rpcs of the gateway's protocol, and the features shared with ours: token, log, metrics."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2

from mlxrunner.v1.runner_pb2 import LoadRequest
from runner_server.config import parse_args
from runner_server.errors import GenerationFailed
from runner_server.telemetry import request_log
from runner_server.telemetry.methods import METHODS, SMG_SERVICE_NAME
from runner_server.telemetry.request_log import RequestLine
from support.command_line import invoke
from support.fakes import DEADLINE_SECONDS, EOS, VOCAB_SIZE, FakeBackend, says
from support.harness import Server, StartServer, eventually, failure

pytest.importorskip("smg_grpc_proto", reason="smg-grpc-proto is not installed (the extra smg)")

from smg_grpc_proto import mlx_engine_pb2 as pb
from smg_grpc_proto import mlx_engine_pb2_grpc
from smg_grpc_proto.generated import common_pb2

from runner_server.api.contracts.model_files import (
    SpecialTokens,
    special_tokens,
    tokenizer_archive,
)
from runner_server.api.contracts.tokenizer_chunks import CHUNK_BYTES, split

DEMO = Path(__file__).parents[2] / "runner_server" / "demo" / "model"
TOKEN = "correct-horse-battery-staple"  # noqa: S105 - of a test


@pytest.fixture
async def server(start_server: StartServer) -> Server:
    """A server without a model."""
    return await start_server(FakeBackend(reply=says("some text")), smg=True)


def stub(server: Server) -> Any:
    return mlx_engine_pb2_grpc.MlxEngineStub(server.channel)


def test_method_names_match_the_protocol() -> None:
    """Compare the names written down in the telemetry with the stubs, an optional package."""
    service = pb.DESCRIPTOR.services_by_name["MlxEngine"]
    assert service.full_name == SMG_SERVICE_NAME
    paths = {path for path in METHODS if path.startswith(f"/{SMG_SERVICE_NAME}/")}
    assert paths == {f"/{SMG_SERVICE_NAME}/{method.name}" for method in service.methods}
    assert len(set(METHODS.values())) == len(METHODS)


async def test_without_a_model_every_rpc_fails(server: Server) -> None:
    for call in (
        stub(server).HealthCheck(pb.HealthCheckRequest()),
        stub(server).GetModelInfo(pb.GetModelInfoRequest()),
        stub(server).GetTokenizer(common_pb2.GetTokenizerRequest()),
        stub(server).Generate(pb.GenerateRequest(text="x")),
    ):
        problem = await failure(call)
        assert problem.code is grpc.StatusCode.FAILED_PRECONDITION
        assert problem.reason == "MODEL_NOT_LOADED"


async def test_with_a_model_the_server_is_healthy(server: Server) -> None:
    await server.load()
    answer = await stub(server).HealthCheck(pb.HealthCheckRequest())
    assert (answer.healthy, answer.message) == (True, "serving fake")


async def test_model_info_describes_the_loaded_model(server: Server) -> None:
    await server.load(context_length=1000)
    info = await stub(server).GetModelInfo(pb.GetModelInfoRequest())
    assert (info.served_model_name, info.model_path) == ("fake", "/models/fake")
    assert (info.model_type, info.is_generation) == ("fake", True)
    assert (info.max_context_length, info.max_req_input_len) == (1000, 999)
    assert (info.vocab_size, list(info.eos_token_ids)) == (VOCAB_SIZE, [EOS])


async def test_server_info_counts_requests(server: Server) -> None:
    await server.load(parallel=1)
    server.backend.step_gate.shut()
    requests = [stub(server).Generate(pb.GenerateRequest(text="x")) for _ in range(3)]

    async def three() -> bool:
        info = await stub(server).GetServerInfo(pb.GetServerInfoRequest())
        return bool(info.active_requests == 3)

    await eventually(three)
    server.backend.step_gate.open()
    for call in requests:
        assert [message async for message in call]
    info = await stub(server).GetServerInfo(pb.GetServerInfoRequest())
    assert (info.server_type, info.active_requests) == ("mlx-grpc-runner", 0)
    assert info.uptime_seconds > 0


def test_the_tokenizer_comes_in_parts_with_its_hash() -> None:
    data = bytes(range(256)) * 600
    digest = hashlib.sha256(data).hexdigest()
    parts = list(split(data, digest))
    assert b"".join(part.data for part in parts) == data
    assert max(len(part.data) for part in parts) == CHUNK_BYTES
    assert [part.sha256 for part in parts] == ["", "", digest]


def test_the_archive_has_only_the_files_a_gateway_needs(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "config.json", "a.jinja", "model.safetensors", "secret.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "dir.model").mkdir()
    data = tokenizer_archive(tmp_path)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.namelist() == ["tokenizer.json", "config.json", "a.jinja"]
        assert archive.read("a.jinja") == b"a.jinja"
    for path in tmp_path.iterdir():
        os.utime(path, (0, 0))
    assert tokenizer_archive(tmp_path) == data


def test_a_missing_tokenizer_is_reported(tmp_path: Path) -> None:
    with pytest.raises(GenerationFailed, match="restore them"):
        tokenizer_archive(tmp_path)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"bos_token_id": 1, "pad_token_id": 2}, SpecialTokens((), 1, 2)),
        ({"bos_token_id": None, "pad_token_id": -1}, SpecialTokens()),
        ({"bos_token_id": [1, 2], "architectures": "x"}, SpecialTokens()),
        ({"architectures": ["A", 3]}, SpecialTokens(("A",))),
    ],
)
def test_special_tokens_come_from_the_config(
    tmp_path: Path, config: dict[str, Any], expected: SpecialTokens
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert special_tokens(tmp_path) == expected


def test_special_tokens_of_the_demo_model() -> None:
    assert special_tokens(DEMO) == SpecialTokens(("LlamaForCausalLM",), 0, 0)


async def test_calls_are_logged_like_ours(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, request_log.__name__)
    await server.load()
    await stub(server).HealthCheck(pb.HealthCheckRequest())
    request = pb.GenerateRequest(request_id="mine", text="hello")
    call = stub(server).Generate(request, metadata=(("x-request-id", "theirs"),))
    assert [message async for message in call]

    def logged() -> list[dict[str, Any]]:
        lines = [record.msg for record in caplog.records if isinstance(record.msg, RequestLine)]
        return [line.fields for line in lines if line.fields["method"] != "Load"]

    await eventually(lambda: bool(logged()))
    # Successful health checks are too frequent for this level.
    (fields,) = logged()
    assert (fields["method"], fields["code"], fields["model"]) == ("Generate", "OK", "fake")
    assert (fields["id"], fields["request_id"]) == ("theirs", "mine")
    assert (fields["prompt_tokens"], fields["generated_tokens"]) == (6, 10)
    assert fields["finish_reason"] == "stop"


async def test_calls_are_counted(start_server: StartServer) -> None:
    pytest.importorskip("prometheus_client", reason="prometheus-client is not installed")
    server = await start_server(smg=True, metrics_listen=("127.0.0.1", 0))
    await server.load()
    request = pb.GenerateRequest(text="x", sampling_params=pb.SamplingParams(max_tokens=3))
    assert [message async for message in stub(server).Generate(request)]
    assert server.app._metrics
    registry = server.app._metrics.registry

    def count() -> float:
        labels = {"method": "Generate", "code": "OK", "reason": ""}
        return registry.get_sample_value("mlx_runner_requests_total", labels) or 0.0

    await eventually(lambda: count() == 1)
    labels = {
        "gen_ai_operation_name": "text_completion",
        "gen_ai_provider_name": "mlx",
        "gen_ai_request_model": "fake",
        "error_type": "",
    }
    name = "gen_ai_server_request_duration_seconds_count"
    assert registry.get_sample_value(name, labels) == 1


async def test_the_token_is_required(start_server: StartServer) -> None:
    server = await start_server(smg=True, token=TOKEN)
    problem = await failure(stub(server).HealthCheck(pb.HealthCheckRequest()))
    assert problem.code is grpc.StatusCode.UNAUTHENTICATED
    right = (("authorization", f"Bearer {TOKEN}"),)
    await server.stub.Load(LoadRequest(model="fake"), metadata=right)
    answer = await stub(server).HealthCheck(pb.HealthCheckRequest(), metadata=right)
    assert answer.healthy


async def test_damaged_bytes_are_an_invalid_argument(server: Server) -> None:
    await server.load()
    call: Any = server.channel.unary_stream(f"/{SMG_SERVICE_NAME}/Generate")
    problem = await failure(call(b"\xff\xff\xff", timeout=DEADLINE_SECONDS))
    assert (problem.code, problem.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")


async def test_health_and_reflection_list_the_service(server: Server) -> None:
    assert await server.health(SMG_SERVICE_NAME) == 1
    reflect: Any = server.channel.stream_stream(
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    asked = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=SMG_SERVICE_NAME),
    ]
    services, files = [answer async for answer in reflect(iter(asked), timeout=DEADLINE_SECONDS)]
    names = {service.name for service in services.list_services_response.service}
    assert SMG_SERVICE_NAME in names
    assert files.file_descriptor_response.file_descriptor_proto


async def test_the_service_is_off_by_default(start_server: StartServer) -> None:
    server = await start_server()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub(server).HealthCheck(pb.HealthCheckRequest())
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_the_option_turns_the_service_on() -> None:
    assert parse_args(["--smg"]).smg
    assert not parse_args([]).smg
    assert "--smg" in invoke("serve", "--help").stdout


_WITHOUT_STUBS = """
import sys
sys.modules["smg_grpc_proto"] = None
from runner_server.__main__ import main
sys.argv = ["runner_server", "--smg"]
sys.exit(main())
"""


def test_the_server_does_not_start_without_the_stubs() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_STUBS],
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_SECONDS,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "--smg needs smg_grpc_proto; install mlx-grpc-runner with the extra smg" in done.stderr
