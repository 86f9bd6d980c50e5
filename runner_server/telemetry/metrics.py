"""Prometheus metrics: counters updated when a call ends, and state read by each scrape.

Imports prometheus_client, an optional dependency. Nothing here runs per token: a scrape reads the
counts of the running requests.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    start_http_server,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from runner_server.engine.engine import Engine
from runner_server.engine.prefix_disk import DiskCounters
from runner_server.engine.types import GenerationStats, State
from runner_server.host.resident_memory import resident_bytes
from runner_server.telemetry.call_record import CallRecord, CallSummary
from runner_server.telemetry.methods import GENERATING

if TYPE_CHECKING:
    from wsgiref.simple_server import WSGIServer

logger = logging.getLogger(__name__)

OPERATION, PROVIDER = "text_completion", "mlx"
"""Values of OpenTelemetry's ``gen_ai.operation.name`` and ``gen_ai.provider.name``."""

# OpenTelemetry's bucket boundaries, with smaller ones for small models and larger ones for long
# prompts on slow machines. All of the original boundaries are included.
_REQUEST_SECONDS = (
    0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92,
    163.84, 327.68, 655.36,
)  # fmt: skip
_FIRST_TOKEN_SECONDS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0,
)  # fmt: skip
_TOKEN_SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5,
)  # fmt: skip

_OTEL_LABELS = ("gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model")


class Metrics:
    """Metrics of calls and of the engine, as an observer of the telemetry interceptor.

    Args:
        engine: The engine, whose state is read at each scrape.
        version: The version of the server.

    Attributes:
        registry: The registry of these metrics, separate from prometheus_client's global one.
    """

    def __init__(self, engine: Engine, version: str) -> None:
        self.registry = registry = CollectorRegistry()
        self._server: WSGIServer | None = None
        self._requests = Counter(
            "mlx_runner_requests", "Requests that have ended.", ("method", "code", "reason"),
            registry=registry,
        )  # fmt: skip
        self._duration = Histogram(
            "gen_ai_server_request_duration_seconds",
            "From the arrival of a completion to its last message or its error.",
            (*_OTEL_LABELS, "error_type"), buckets=_REQUEST_SECONDS, registry=registry,
        )  # fmt: skip
        self._first_token = Histogram(
            "gen_ai_server_time_to_first_token_seconds",
            "Queue and prefill time of completions that ran to their end.",
            _OTEL_LABELS, buckets=_FIRST_TOKEN_SECONDS, registry=registry,
        )  # fmt: skip
        self._per_token = Histogram(
            "gen_ai_server_time_per_output_token_seconds",
            "Time per token after the first, of completions that ran to their end.",
            _OTEL_LABELS, buckets=_TOKEN_SECONDS, registry=registry,
        )  # fmt: skip
        self._queue = Histogram(
            "mlx_runner_request_queue_time_seconds",
            "How long completions waited for a slot, cancelled ones included.",
            ("model_name",), buckets=_FIRST_TOKEN_SECONDS, registry=registry,
        )  # fmt: skip
        self._tokens = _Tokens()
        registry.register(self._tokens)
        registry.register(_State(engine, version))
        ProcessCollector(registry=registry)

    def observe(self, call: CallRecord) -> Callable[[CallSummary], None]:
        """Start counting the tokens of a call; see ``Observer.observe``."""
        self._tokens.follow(call)
        return partial(self._end, call)

    def _end(self, record: CallRecord, call: CallSummary) -> None:
        self._tokens.settle(record, call)
        self._requests.labels(call.method, call.code, call.reason).inc()
        if call.method not in GENERATING:
            return
        labels = (OPERATION, PROVIDER, call.model)
        error = "" if call.code == "OK" else call.reason or call.code
        self._duration.labels(*labels, error).observe(call.seconds)
        if call.stats:
            self._observe_stats(labels, call.stats)

    def _observe_stats(self, labels: tuple[str, str, str], stats: GenerationStats) -> None:
        self._queue.labels(labels[-1]).observe(stats.queue_seconds)
        if stats.reason and stats.prompt_seconds is not None:
            first = stats.queue_seconds + stats.prompt_seconds
            self._first_token.labels(*labels).observe(first)
        if stats.reason and stats.eval_seconds is not None and stats.eval_count > 1:
            each = stats.eval_seconds / (stats.eval_count - 1)
            self._per_token.labels(*labels).observe(each)

    def listen(self, host: str, port: int) -> str:
        """Answer scrapes on a separate thread; return the URL.

        Raises:
            OSError: The address cannot be listened on.
        """
        self._server, _ = start_http_server(port, host, self.registry)
        shown = f"[{host}]" if ":" in host else host
        return f"http://{shown}:{self._server.server_port}/metrics"

    def close(self) -> None:
        """Stop answering scrapes, without waiting for the end."""
        if self._server:
            threading.Thread(target=self._shut, args=(self._server,), daemon=True).start()

    @staticmethod
    def _shut(server: WSGIServer) -> None:
        # Takes up to half a second, because the server checks for a shutdown twice a second.
        server.shutdown()
        server.server_close()


class _Tokens(Collector):
    """Token counts per model, including completions still running."""

    _KINDS = (
        ("prompt", "Prompt tokens of completions that have reached their first token."),
        ("prompt_cached", "The part of the prompt tokens taken from the prefix cache."),
        ("generation", "Tokens generated."),
        ("drafted", "Tokens drafted, by prompt lookup or a draft model."),
        ("draft_accepted", "The part of the generated tokens that was drafted."),
    )

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._live: set[CallRecord] = set()
        self._ended: dict[str, tuple[int, ...]] = {}

    def follow(self, call: CallRecord) -> None:
        """Start counting the tokens of a running call."""
        with self._lock:
            self._live.add(call)

    def settle(self, record: CallRecord, call: CallSummary) -> None:
        """Move a call's counts from the running ones to the totals, atomically."""
        with self._lock:
            self._live.discard(record)
            if call.stats:
                _add(self._ended, call.model, call.stats)

    def collect(self) -> Iterator[Metric]:
        """Yield the token counters for a scrape."""
        with self._lock:
            totals = dict(self._ended)
            for call in self._live:
                if call.stats:
                    _add(totals, call.model, call.stats())
        for index, (kind, meaning) in enumerate(self._KINDS):
            family = CounterMetricFamily(
                f"mlx_runner_{kind}_tokens", meaning, labels=["model_name"]
            )
            for model, counts in totals.items():
                family.add_metric([model], counts[index])
            yield family


def _add(totals: dict[str, tuple[int, ...]], model: str, stats: GenerationStats) -> None:
    prompt = (stats.prompt_count, stats.cached_count) if stats.eval_count else (0, 0)
    counts = (*prompt, stats.eval_count, stats.drafted_count, stats.accepted_count)
    before = totals.get(model, (0,) * len(counts))
    totals[model] = tuple(a + b for a, b in zip(before, counts, strict=True))


class _State(Collector):
    """Engine state as reported by ``Status``, read at each scrape."""

    def __init__(self, engine: Engine, version: str) -> None:
        self._engine = engine
        self._version = version

    def collect(self) -> Iterator[Metric]:
        """Yield the gauges for a scrape."""
        now = self._engine.state()
        model = now.model
        yield _gauge("num_requests_running", "Completions that have started.", now.running_count)
        yield _gauge("num_requests_waiting", "Completions waiting for a slot.", now.queued_count)
        capacity = now.kv_token_capacity
        yield _gauge(
            "kv_cache_usage_perc",
            "Tokens in the KV caches of running completions per token that fits, 0 to 1.",
            now.kv_token_count / capacity if capacity else 0.0,
        )
        yield CounterMetricFamily("mlx_runner_engine_steps", "Engine steps.", value=now.step_count)
        state = GaugeMetricFamily(
            "mlx_runner_state", "1 for the current state, 0 for the others.", labels=["state"]
        )
        for each in State:
            state.add_metric([each.value], each is now.state)
        yield state
        yield _gauge("load_progress_ratio", "Progress of the load, 0 to 1.", now.progress / 100)
        if now.last_progress_age is not None:
            yield _gauge(
                "last_progress_age_seconds",
                "Time since the engine last made progress; absent when it has nothing to do.",
                now.last_progress_age,
            )
        yield self._memory(model.limit_bytes if model else 0)
        yield from self._disk()
        info = GaugeMetricFamily(
            "mlx_runner_info", "Always 1.", labels=["version", "device", "model_name"]
        )
        info.add_metric([self._version, self._engine.device, model.name if model else ""], 1)
        yield info

    def _disk(self) -> Iterator[Metric]:
        """Yield the counters of the prefix cache on disk."""
        disk = self._engine.memory().disk or DiskCounters()
        held = "All files in the directory of the prefix cache on disk."
        yield _gauge("prefix_cache_disk_bytes", held, disk.held_bytes)
        counts = {
            "written_bytes": ("Bytes written to the prefix cache on disk.", disk.written_bytes),
            "read_bytes": ("Bytes read from the prefix cache on disk.", disk.read_bytes),
            "damaged": ("Damaged files removed from it.", disk.damaged_count),
        }
        for name, (meaning, value) in counts.items():
            full = f"mlx_runner_prefix_cache_disk_{name}"
            yield CounterMetricFamily(full, meaning, value=value)

    def _memory(self, limit_bytes: int) -> Metric:
        memory = self._engine.memory()
        family = GaugeMetricFamily(
            "mlx_runner_memory_bytes", "Memory held by MLX and by the process.", labels=["kind"]
        )
        kinds = {
            "active": memory.active_bytes,
            "cache": memory.cache_bytes,
            "peak": memory.peak_bytes,
            "prefix_cache": memory.prefix_cache_bytes,
            "process": resident_bytes(),
            "limit": limit_bytes,
        }
        for kind, size in kinds.items():
            family.add_metric([kind], size)
        return family


def _gauge(name: str, meaning: str, value: float) -> Metric:
    return GaugeMetricFamily(f"mlx_runner_{name}", meaning, value=value)
