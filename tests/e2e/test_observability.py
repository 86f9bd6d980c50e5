"""Observability of a real process: metrics over HTTP, a JSON log and exported spans."""

from __future__ import annotations

import gzip
import json
import queue
import re
import signal
import threading
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from support.server_child import DEADLINE_SECONDS, running

pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")
pytest.importorskip("prometheus_client", reason="prometheus-client is not installed")
collector = pytest.importorskip(
    "opentelemetry.proto.collector.trace.v1.trace_service_pb2",
    reason="opentelemetry-exporter-otlp-proto-http is not installed",
)
pytestmark = pytest.mark.mlx

Build = Callable[..., Path]


@pytest.fixture
def spans() -> Iterator[tuple[str, queue.Queue[Any]]]:
    """Run a collector of spans; yield the address of the collector and a queue of spans."""
    found: queue.Queue[Any] = queue.Queue()

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            for resource in collector.ExportTraceServiceRequest.FromString(body).resource_spans:
                for scope in resource.scope_spans:
                    for span in scope.spans:
                        found.put((resource.resource, span))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Keep requests out of the test's output."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", found
    server.shutdown()
    thread.join()
    server.server_close()


def _scrape(address: str) -> str:
    request = urllib.request.Request(address)  # noqa: S310 - matched as http
    with urllib.request.urlopen(request, timeout=DEADLINE_SECONDS) as answer:  # noqa: S310
        text: str = answer.read().decode()
    return text


def test_metrics_log_and_spans_of_a_process_agree(
    tmp_path: Path, model_dir: Build, spans: tuple[str, queue.Queue[Any]]
) -> None:
    endpoint, exported = spans
    options = ("--metrics-listen", "127.0.0.1:0", "--log-format", "json")
    with running(tmp_path, *options, OTEL_EXPORTER_OTLP_ENDPOINT=endpoint) as child:
        child.load(model_dir())
        assert list(child.complete(5))[-1].eval_count == 5
        address = re.search(r"metrics on (http://127.0.0.1:\d+/metrics)", child.log.read_text())
        assert address
        # Metrics are updated one by one once the caller has the last message.
        child.wait_for(lambda: "time_to_first_token_seconds_bucket" in _scrape(address[1]))
        scraped = _scrape(address[1])
        # The shutdown interrupts this request; its log line and span must not be lost.
        next(child.complete(10_000))
        child.process.send_signal(signal.SIGINT)
        assert child.wait() == 0, child.log.read_text()
        log = [json.loads(line) for line in child.log.read_text().splitlines()]
    name = model_dir().name
    assert f'mlx_runner_generation_tokens_total{{model_name="{name}"}} 5.0' in scraped
    assert 'mlx_runner_state{state="active"} 1.0' in scraped
    assert "gen_ai_server_time_to_first_token_seconds_bucket" in scraped
    assert "process_resident_memory_bytes" in scraped
    line, cut = [entry for entry in log if entry.get("method") == "Completion"]
    assert (line["code"], line["generated_tokens"], line["finish_reason"]) == ("OK", 5, "length")
    assert (cut["code"], cut["reason"]) == ("UNAVAILABLE", "SHUTTING_DOWN")
    # Pending spans are sent before the exit.
    sent = [exported.get(timeout=DEADLINE_SECONDS) for _ in range(3)]
    names = [span.name.rpartition("/")[2] for _, span in sent]
    assert sorted(names) == ["Completion", "Completion", "Load"]
    assert {span.span_id.hex() for _, span in sent} >= {line["span_id"], cut["span_id"]}
    resource, _ = sent[0]
    service = {each.key: each.value.string_value for each in resource.attributes}
    assert service["service.name"] == "mlx-grpc-runner"
