"""Prometheus metrics of a pool, by model.

Imports prometheus_client, an optional dependency.
"""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from runner_client.pool.scheduling.states import ModelState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from wsgiref.simple_server import WSGIServer

    from prometheus_client.core import Metric

    from runner_client.pool.types import PoolModel, PoolStatus

_SCRAPE_SECONDS = 5.0
_LABEL = "model_name"

_WAIT_SECONDS = (0.001, 0.01, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
"""Bounds of waits for a model, most of which are the time of a load."""

_GAUGES: tuple[tuple[str, str, Callable[[PoolModel], float]], ...] = (
    ("held_bytes", "Memory that counts against the budget.", lambda model: model.held_bytes),
    ("leases", "Calls that use the model.", lambda model: model.leases),
    ("waiting", "Requests that wait for the model.", lambda model: model.waiting_count),
    ("pinned", "1 if the model is never evicted to make room.", lambda model: model.is_pinned),
    ("idle_seconds", "Time since the last use.", lambda model: model.idle_seconds or 0),
)


class PoolMetrics:
    """Metrics of a pool: its state, read by each scrape, and the waits for models.

    Create instances on the event loop of the pool.

    Args:
        status: Returns the state of the pool; called on the event loop.
    """

    def __init__(self, status: Callable[[], PoolStatus]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_State(status))
        self._status = status
        self._requests = Counter(
            "mlx_runner_pool_requests",
            "Requests that got their model, or ended without it.",
            [_LABEL, "outcome"],
            registry=self.registry,
        )
        self._waits = Histogram(
            "mlx_runner_pool_wait_seconds",
            "How long requests waited for their model.",
            [_LABEL],
            buckets=_WAIT_SECONDS,
            registry=self.registry,
        )
        self._server: WSGIServer | None = None

    def observe(self, model: str, outcome: str, seconds: float) -> None:
        """Count a request that waited for a model.

        Args:
            model: The model, as requested.
            outcome: ``granted``, ``refused`` or ``cancelled``.
            seconds: How long it waited.
        """
        # Callers choose names, so that unknown ones have one label together.
        models = self._status().models
        name = next((each.name for each in models if model in (each.name, each.path)), "")
        self._requests.labels(name, outcome).inc()
        self._waits.labels(name).observe(seconds)

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
            threading.Thread(target=_shut, args=(self._server,), daemon=True).start()


def _shut(server: WSGIServer) -> None:
    # Takes up to half a second, because the server checks for a shutdown twice a second.
    server.shutdown()
    server.server_close()


class _State(Collector):
    """State of the pool at each scrape."""

    def __init__(self, status: Callable[[], PoolStatus]) -> None:
        self._status = status
        self._loop = asyncio.get_running_loop()

    def describe(self) -> Iterator[Metric]:
        """Yield nothing: a collection at registration would wait for the event loop."""
        yield from ()

    def collect(self) -> Iterator[Metric]:
        """Yield the gauges for a scrape, on its thread."""
        status = asyncio.run_coroutine_threadsafe(self._read(), self._loop).result(_SCRAPE_SECONDS)
        yield _gauge("budget_bytes", "The budget; 0 if there is none.", status.budget_bytes or 0)
        yield _gauge(
            "total_held_bytes", "Memory of all models and spare processes.", status.held_bytes
        )
        yield _gauge("spare_processes", "Spare processes that have started.", status.spare_count)
        yield _gauge("spare_bytes", "Memory of spare processes.", status.spare_bytes)
        for name, meaning, value in _GAUGES:
            family = GaugeMetricFamily(f"mlx_runner_pool_{name}", meaning, labels=[_LABEL])
            for model in status.models:
                family.add_metric([model.name], value(model))
            yield family
        states = GaugeMetricFamily(
            "mlx_runner_pool_state",
            "1 for the current state, 0 for the others.",
            labels=[_LABEL, "state"],
        )
        loads = CounterMetricFamily(
            "mlx_runner_pool_loads", "Loads that have begun.", labels=[_LABEL]
        )
        for model in status.models:
            loads.add_metric([model.name], model.load_count)
            for state in ModelState:
                states.add_metric([model.name, state.value], state is model.state)
        yield states
        yield loads

    async def _read(self) -> PoolStatus:
        return self._status()


def _gauge(name: str, meaning: str, value: float) -> Metric:
    return GaugeMetricFamily(f"mlx_runner_pool_{name}", meaning, value=value)
