"""Prometheus metrics: names, counts and the time of reading."""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import sys
import threading
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from support.fakes import FakeBackend
from support.harness import Server, StartServer, eventually, failure, running

pytest.importorskip("prometheus_client", reason="prometheus-client is not installed")

from prometheus_client import start_http_server
from prometheus_client.parser import text_string_to_metric_families

from runner_common.serving.listen import CannotListenError
from runner_server.config import parse_args
from runner_server.telemetry import metrics

ROOT = Path(__file__).parents[2]
LOOPBACK = ("127.0.0.1", 0)

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@pytest.fixture
async def scraped(start_server: StartServer) -> Server:
    """A loaded server with metrics."""
    server = await start_server(metrics_listen=LOOPBACK)
    await server.load()
    return server


def _text(server: Server) -> str:
    assert server.app._metrics
    assert server.app._metrics._server
    port = server.app._metrics._server.server_port
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        data: bytes = answer.read()
    return data.decode()


def _samples(server: Server) -> Samples:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(_text(server))
        for sample in family.samples
    }


async def samples(server: Server) -> Samples:
    """Scrape over HTTP, in a thread beside the event loop."""
    return await server.thread(lambda: _samples(server))


def value(found: Samples, name: str, **labels: str) -> float:
    """Return the only sample of a name with these labels, and possibly others."""
    (sample,) = [
        each
        for (its_name, its_labels), each in found.items()
        if its_name == name and labels.items() <= dict(its_labels).items()
    ]
    return sample


async def test_completions_are_counted_and_timed(scraped: Server) -> None:
    for _ in range(3):
        await scraped.complete(num_predict=5)
    await scraped.complete(num_predict=1)
    assert (await failure(scraped.start(""))).reason == "INVALID_FIELD"
    await eventually(lambda: "INVALID_FIELD" in _text(scraped))
    call = {"method": "Completion"}
    found = await samples(scraped)
    assert value(found, "mlx_runner_requests_total", code="OK", **call) == 4
    assert value(found, "mlx_runner_requests_total", code="OK", method="Load") == 1
    model = {"model_name": "fake"}
    assert value(found, "mlx_runner_prompt_tokens_total", **model) == 4 * 6
    assert value(found, "mlx_runner_prompt_cached_tokens_total", **model) == 0
    assert value(found, "mlx_runner_generation_tokens_total", **model) == 16
    assert value(found, "mlx_runner_request_queue_time_seconds_count", **model) == 4
    named = {
        "gen_ai_operation_name": "text_completion",
        "gen_ai_provider_name": "mlx",
        "gen_ai_request_model": "fake",
    }
    prefix = "gen_ai_server"
    assert value(found, f"{prefix}_time_to_first_token_seconds_count", **named) == 4
    # A completion of one token has no time between tokens.
    assert value(found, f"{prefix}_time_per_output_token_seconds_count", **named) == 3
    assert value(found, f"{prefix}_request_duration_seconds_count", error_type="", **named) == 4
    refused = value(found, f"{prefix}_request_duration_seconds_count", error_type="INVALID_FIELD")
    assert refused == 1


async def test_the_usage_of_the_kv_cache_is_a_share(scraped: Server) -> None:
    gate = scraped.backend.step_gate
    gate.shut()
    call = scraped.start("x" * 100)
    await scraped.thread(gate.wait_arrival)
    gate.allow()
    await scraped.thread(lambda: gate.wait_passed(1))
    await scraped.thread(gate.wait_arrival)
    state = scraped.app.engine.state()
    usage = state.kv_token_count / state.kv_token_capacity
    assert value(await samples(scraped), "mlx_runner_kv_cache_usage_perc") == usage > 0
    call.cancel()


async def test_gauges_have_the_state_at_the_scrape(scraped: Server) -> None:
    idle = await samples(scraped)
    assert not [name for name, _ in idle if name == "mlx_runner_last_progress_age_seconds"]
    scraped.backend.step_gate.shut()
    calls = [scraped.start(str(i)) for i in range(6)]
    await eventually(lambda: scraped.view.request_count == 6)
    await scraped.thread(scraped.backend.step_gate.wait_arrival)
    busy = [await samples(scraped) for _ in range(2)]
    state = scraped.app.engine.state()
    assert value(busy[0], "mlx_runner_num_requests_running") == state.running_count > 0
    assert value(busy[0], "mlx_runner_num_requests_waiting") == state.queued_count > 0
    ages = [value(each, "mlx_runner_last_progress_age_seconds") for each in busy]
    assert ages[1] > ages[0]
    assert value(busy[0], "mlx_runner_state", state="active") == 1
    assert value(busy[0], "mlx_runner_state", state="idle") == 0
    status = await scraped.status()
    for kind in ("active", "peak", "limit"):
        held = getattr(status.memory_usage, f"{kind}_bytes")
        assert value(busy[0], "mlx_runner_memory_bytes", kind=kind) == held > 0
    assert value(busy[0], "mlx_runner_memory_bytes", kind="process") > 0
    for call in calls:
        call.cancel()
    scraped.backend.step_gate.open()


async def test_tokens_of_a_running_completion_are_counted(scraped: Server) -> None:
    scraped.backend.step_gate.shut()
    scraped.backend.step_gate.allow(4)
    call = scraped.start()
    await scraped.thread(scraped.backend.step_gate.wait_arrival)
    assert value(await samples(scraped), "mlx_runner_generation_tokens_total") == 3
    scraped.backend.step_gate.allow(2)
    await scraped.thread(lambda: scraped.backend.step_gate.wait_passed(6))
    await scraped.thread(scraped.backend.step_gate.wait_arrival)
    assert value(await samples(scraped), "mlx_runner_generation_tokens_total") == 5
    call.cancel()
    scraped.backend.step_gate.open()
    await scraped.settled()
    assert value(await samples(scraped), "mlx_runner_generation_tokens_total") >= 5


async def test_counters_never_go_back(scraped: Server) -> None:
    """Move requests from running to finished between two scrapes."""
    seen: list[float] = []
    done = threading.Event()

    key = ("mlx_runner_generation_tokens_total", (("model_name", "fake"),))

    def scrape() -> None:
        while not done.is_set():
            found = _samples(scraped)
            seen.append(found.get(key, 0))

    watcher = asyncio.ensure_future(asyncio.to_thread(scrape))
    try:
        for _ in range(10):
            await asyncio.gather(*(scraped.complete(str(i), num_predict=20) for i in range(4)))
    finally:
        done.set()
        await watcher
    assert seen == sorted(seen)
    last = await samples(scraped)
    assert value(last, "mlx_runner_generation_tokens_total") == 800


async def test_an_unknown_method_does_not_become_a_label(start_server: StartServer) -> None:
    server = await start_server(metrics_listen=LOOPBACK, token="x" * 32)
    for name in ("Invented", "Status"):
        call: Any = server.channel.unary_unary(f"/mlxrunner.v1.RunnerService/{name}")
        assert (await failure(call(b""))).reason == "UNAUTHENTICATED"
    await eventually(lambda: "UNAUTHENTICATED" in _text(server))
    assert "Invented" not in _text(server)


async def test_without_the_option_nothing_is_counted(loaded: Server) -> None:
    assert loaded.app._metrics is None
    assert "Metrics" not in {type(each).__name__ for each in loaded.app._observers}


async def test_two_servers_in_a_process_have_separate_metrics(
    scraped: Server, start_server: StartServer
) -> None:
    other = await start_server(metrics_listen=LOOPBACK)
    await scraped.complete(num_predict=1)
    name = "mlx_runner_generation_tokens_total"
    assert value(await samples(scraped), name) == 1
    assert not [each for each, _ in await samples(other) if each == name]


async def test_a_port_in_use_fails_before_the_ready_line(socket_dir: Path) -> None:
    announced: list[object] = []
    with socket.socket() as taken:
        taken.bind(LOOPBACK)
        taken.listen()
        taken_address = taken.getsockname()
        with pytest.raises(
            CannotListenError, match=rf"--metrics-listen 127.0.0.1:{taken_address[1]}"
        ):
            async with running(socket_dir, FakeBackend(), metrics_listen=taken_address):
                announced.append("not reached")
    assert not announced


@pytest.mark.parametrize("host", ["no.such.host.invalid", "x" * 99])
async def test_an_unknown_host_is_reported(socket_dir: Path, host: str) -> None:
    with pytest.raises(CannotListenError, match=f"--metrics-listen {host}:0"):
        async with running(socket_dir, FakeBackend(), metrics_listen=(host, 0)):
            pass


async def test_without_the_library_the_error_says_what_to_install(
    socket_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "runner_server.telemetry.metrics")
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(CannotListenError, match=r"prometheus_client.*the extra metrics"):
        async with running(socket_dir, FakeBackend(), metrics_listen=LOOPBACK):
            pass


@pytest.mark.parametrize(
    ("given", "read"),
    [("127.0.0.1:9464", ("127.0.0.1", 9464)), ("[::1]:0", ("::1", 0)), ("box:1", ("box", 1))],
)
def test_the_option_is_parsed(given: str, read: tuple[str, int]) -> None:
    assert parse_args(["--metrics-listen", given]).metrics_listen == read


@pytest.mark.parametrize("given", ["9464", ":9464", "box", "box:", "box:-1", "box:65536"])
def test_a_bad_option_is_refused(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args(["--metrics-listen", given])
    assert "expected HOST:PORT" in capsys.readouterr().err


async def test_an_open_address_gives_a_warning(
    start_server: StartServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = start_http_server
    # The stand-in listens on loopback instead of the open address.
    monkeypatch.setattr(
        metrics,
        "start_http_server",
        lambda port, _host, registry: real(port, "127.0.0.1", registry),
    )
    with caplog.at_level(logging.WARNING):
        await start_server(metrics_listen=("192.0.2.1", 0))
    assert "without authentication" in caplog.text


async def test_every_metric_is_documented(scraped: Server) -> None:
    await scraped.complete(num_predict=2)
    scraped.backend.step_gate.shut()
    call = scraped.start()
    await scraped.thread(scraped.backend.step_gate.wait_arrival)
    text = await scraped.thread(lambda: _text(scraped))
    call.cancel()
    scraped.backend.step_gate.open()
    shown = {
        name: kind
        for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE)
        if not name.endswith("_created") and not name.startswith("process_")
    }
    table = (ROOT / "docs/observability.md").read_text()
    documented = dict(
        re.findall(r"^\| `((?:mlx_runner|gen_ai)_\w+)` \| (\w+) ", table, re.MULTILINE)
    )
    assert shown == documented
