"""What the HTTP port owes to the process: tokens, cancelling, draining, the log and the end."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import grpc
import pytest

pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

import openai
from google.protobuf.duration_pb2 import Duration

from mlxrunner.v1 import runner_pb2 as pb
from mlxrunner.v1 import runner_pb2_grpc
from support.fake_child import wait_until
from support.http_child import HttpChild, http_server
from support.models import build_model

pytestmark = pytest.mark.mlx

TOKEN, USE_TOKEN = "t" * 20, "u" * 20
SECRETS = {"MLX_RUNNER_TOKEN": TOKEN, "MLX_RUNNER_USE_TOKEN": USE_TOKEN}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a long context."""
    return build_model(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=16_384)


@pytest.fixture
def child(tmp_path: Path, model: Path) -> Iterator[HttpChild]:
    """A server with tokens, which runs one request at a time."""
    options = ("--context-length", "16000", "--parallel", "1", "--max-queued", "1")
    with http_server(tmp_path, model, *options, **SECRETS) as running:
        yield running


@pytest.fixture
def stub(child: HttpChild) -> Iterator[runner_pb2_grpc.RunnerServiceStub]:
    """A client of gRPC."""
    with grpc.insecure_channel(child.address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        yield runner_pb2_grpc.RunnerServiceStub(channel)


def metadata() -> Any:
    return (("authorization", f"Bearer {TOKEN}"),)


def counts(stub: Any) -> tuple[int, int]:
    status = stub.Status(pb.StatusRequest(), metadata=metadata())
    return status.running_count, status.queued_count


def connect(child: HttpChild) -> HTTPConnection:
    host, port = child.url.removeprefix("http://").split(":")
    return HTTPConnection(host, int(port), timeout=60)


def endless(child: HttpChild) -> tuple[HTTPConnection, HTTPResponse]:
    """Start a stream that lasts until it is cancelled."""
    connection = connect(child)
    body = {"prompt": "def", "stream": True, "logit_bias": {"0": -100}, "temperature": 0}
    headers = {"content-type": "application/json", "authorization": f"Bearer {USE_TOKEN}"}
    connection.request("POST", "/v1/completions", json.dumps(body).encode(), headers)
    response = connection.getresponse()
    assert response.status == 200
    return connection, response


def complete(child: HttpChild, token: str, **options: Any) -> Any:
    with openai.OpenAI(base_url=f"{child.url}/v1", api_key=token, max_retries=0) as client:
        return client.completions.create(model="tiny", prompt="x", **options)


def test_a_token_is_the_key(child: HttpChild) -> None:
    for token in (TOKEN, USE_TOKEN):
        assert complete(child, token, max_tokens=1)
    with pytest.raises(openai.AuthenticationError) as refused:
        complete(child, "wrong")
    assert refused.value.code == "UNAUTHENTICATED"
    assert child.call("GET", "/health") == (200, {"status": "ok"})
    log = child.log.read_text()
    assert "Completion OK" in log
    assert "path=/v1/completions" in log
    assert "generated_tokens=1" in log
    assert TOKEN not in log


def test_a_client_that_disconnects_cancels_its_request(child: HttpChild, stub: Any) -> None:
    connection, response = endless(child)
    assert response.readline().startswith(b"data: ")
    assert counts(stub)[0] == 1
    response.close()
    connection.close()
    wait_until(lambda: counts(stub) == (0, 0))
    wait_until(lambda: "Completion CANCELLED" in child.log.read_text())


def test_a_full_queue_says_when_to_retry(child: HttpChild, stub: Any) -> None:
    streams = [endless(child), endless(child)]
    wait_until(lambda: counts(stub) == (1, 1))
    with pytest.raises(openai.RateLimitError) as refused:
        complete(child, USE_TOKEN)
    assert refused.value.code == "QUEUE_FULL"
    assert int(refused.value.response.headers["retry-after"]) >= 1
    for connection, response in streams:
        response.close()
        connection.close()
    wait_until(lambda: counts(stub) == (0, 0))


def test_draining_and_an_abort(child: HttpChild, stub: Any) -> None:
    connection, response = endless(child)
    assert stub.Drain(pb.DrainRequest(timeout=Duration()), metadata=metadata()).aborted_count == 1
    text = response.read().decode()
    assert '"code": "ABORTED"' in text
    assert "[DONE]" not in text
    connection.close()
    status, answer = child.call("GET", "/health")
    assert (status, answer["error"]["code"]) == (503, "SHUTTING_DOWN")
    stub.Unload(pb.UnloadRequest(), metadata=metadata())
    with pytest.raises(openai.InternalServerError) as refused:
        complete(child, TOKEN)
    assert (refused.value.status_code, refused.value.code) == (503, "MODEL_NOT_LOADED")


def test_a_stop_ends_streams_and_idle_connections(child: HttpChild) -> None:
    idle = connect(child)
    idle.request("GET", "/health")
    idle.getresponse().read()
    connection, response = endless(child)
    assert response.readline()
    child.process.send_signal(signal.SIGTERM)
    assert "SHUTTING_DOWN" in response.read().decode()
    assert child.process.wait(20) == 0
    idle.close()
    connection.close()
