"""One span for each call, below the caller's span; none unless tracing is set up."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable

import pytest

from mlxrunner.v1 import runner_pb2 as pb
from runner_client import AsyncRunnerClient, Options, RunnerClient
from runner_client.rpc.transport.trace import with_trace
from runner_server.telemetry import tracing
from support.fakes import says
from support.harness import Server, StartServer, eventually, failure

pytest.importorskip("opentelemetry.sdk", reason="opentelemetry-sdk is not installed")

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

SERVICE = "mlxrunner.v1.RunnerService"
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

Spans = Callable[[], list[ReadableSpan]]


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    """Exporter keeping the spans in memory."""
    return InMemorySpanExporter()


@pytest.fixture
def provider(exporter: InMemorySpanExporter) -> TracerProvider:
    """Provider recording every span."""
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return provider


@pytest.fixture
async def traced(
    start_server: StartServer, provider: TracerProvider, monkeypatch: pytest.MonkeyPatch
) -> Server:
    """A loaded server with tracing."""
    made = tracing.Tracing("1", provider)
    monkeypatch.setattr("runner_server.app.open_tracing", lambda _version: made)
    server = await start_server()
    await server.load()
    return server


async def finished_span(exporter: InMemorySpanExporter, method: str) -> ReadableSpan:
    """Return the only span of a method, which ends a moment after the answer."""

    def found() -> list[ReadableSpan]:
        spans = exporter.get_finished_spans()
        return [span for span in spans if span.name == f"{SERVICE}/{method}"]

    await eventually(lambda: bool(found()))
    (span,) = found()
    return span


async def test_a_completion_has_a_server_span(
    traced: Server, exporter: InMemorySpanExporter
) -> None:
    traced.backend.reply = says("ab")
    request = pb.CompletionRequest(prompt="hello", request_id="mine")
    call = traced.stub.Completion(request, metadata=(("x-request-id", "abc"),))
    async for _ in call:
        pass
    span = await finished_span(exporter, "Completion")
    assert span.kind is SpanKind.SERVER
    assert span.parent is None
    assert span.status.status_code is StatusCode.UNSET
    attributes = dict(span.attributes or {})
    times = [attributes.pop(f"mlx_runner.{n}_seconds") for n in ("queue", "prefill", "generation")]
    assert attributes == {
        "rpc.system.name": "grpc",
        "rpc.method": f"{SERVICE}/Completion",
        "rpc.response.status_code": "OK",
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "mlx",
        "gen_ai.request.model": "fake",
        "gen_ai.usage.input_tokens": 6,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.response.finish_reasons": ("stop",),
        "mlx_runner.id": "abc",
        "mlx_runner.request_id": "mine",
    }
    assert span.start_time
    assert span.end_time
    assert sum(float(str(each)) for each in times) * 1e9 <= span.end_time - span.start_time + 1e6


async def test_the_span_is_a_child_of_the_callers_span(
    traced: Server, exporter: InMemorySpanExporter, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    request = pb.TokenizeRequest(content="x")
    await traced.stub.Tokenize(request, metadata=(("traceparent", TRACEPARENT),))
    span = await finished_span(exporter, "Tokenize")
    assert span.parent
    assert span.context
    assert f"00-{span.parent.trace_id:032x}-{span.parent.span_id:016x}-01" == TRACEPARENT
    await eventually(lambda: "Tokenize OK" in caplog.text)
    assert f"span_id={span.context.span_id:016x}" in caplog.text


# By chance gRPC itself refuses some calls with headers of more than 8 KiB.
@pytest.mark.parametrize("bad", ["00-xyz", TRACEPARENT.replace("0af7", "0AF7"), "00--", "x" * 4000])
async def test_an_invalid_parent_is_ignored(
    traced: Server, exporter: InMemorySpanExporter, bad: str
) -> None:
    request = pb.TokenizeRequest(content="x")
    await traced.stub.Tokenize(request, metadata=(("traceparent", bad),))
    assert (await finished_span(exporter, "Tokenize")).parent is None


async def test_only_the_servers_faults_are_errors(
    traced: Server, exporter: InMemorySpanExporter
) -> None:
    assert (await failure(traced.start(""))).reason == "INVALID_FIELD"
    span = await finished_span(exporter, "Completion")
    assert span.status.status_code is StatusCode.UNSET
    assert (span.attributes or {})["error.type"] == "INVALID_FIELD"
    exporter.clear()
    traced.backend.failures.append(RuntimeError("broken"))
    assert (await failure(traced.start())).reason == "GENERATION_FAILED"
    span = await finished_span(exporter, "Completion")
    assert span.status.status_code is StatusCode.ERROR
    assert (span.attributes or {})["rpc.response.status_code"] == "INTERNAL"


async def test_both_clients_pass_on_their_context(
    traced: Server, provider: TracerProvider, exporter: InMemorySpanExporter
) -> None:
    tracer, address = provider.get_tracer("test"), traced.ready.target

    def ask() -> None:
        with tracer.start_as_current_span("sync"), RunnerClient(address) as client:
            client.complete("x", options=Options(num_predict=1))
            client.status()

    await traced.thread(ask)
    with tracer.start_as_current_span("async"):
        async with AsyncRunnerClient(address) as client:
            await client.tokenize("x")
    for method, caller in (("Completion", "sync"), ("Status", "sync"), ("Tokenize", "async")):
        span = await finished_span(exporter, method)
        (parent,) = [each for each in exporter.get_finished_spans() if each.name == caller]
        assert span.parent
        assert parent.context
        assert span.parent.span_id == parent.context.span_id


def test_a_client_without_a_context_sends_nothing() -> None:
    assert with_trace(None) is None
    assert with_trace((("a", "b"),)) == (("a", "b"),)


CLIENT = """
import sys
from runner_client import RunnerClient
from runner_client.testing import fake_runner
with fake_runner() as runner, RunnerClient(runner.address) as client:
    assert client.complete("Hi").content
import runner_server.app, runner_server.telemetry.tracing
assert runner_server.telemetry.tracing.open_tracing("1") is None
tops = {name.partition(".")[0] for name in sys.modules}
print(tops & {"opentelemetry", "prometheus_client"})
"""


def test_opentelemetry_is_not_imported_unless_needed() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CLIENT], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "set()\n", done.stderr


def test_an_endpoint_without_the_library_gives_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    assert tracing.open_tracing("1") is None
    assert "pip install '.[otel]'" in caplog.text
