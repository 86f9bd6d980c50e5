"""OpenTelemetry spans, where its API is installed. Nothing here needs it to be."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from typing import TYPE_CHECKING

from runner_server.telemetry.call_record import CallRecord
from runner_server.telemetry.methods import FULL_NAMES, GENERATING

if TYPE_CHECKING:
    from opentelemetry.trace import Span, TracerProvider
    from opentelemetry.util.types import AttributeValue

logger = logging.getLogger(__name__)

_ERRORS = frozenset(
    {
        "UNKNOWN",
        "DEADLINE_EXCEEDED",
        "UNIMPLEMENTED",
        "INTERNAL",
        "UNAVAILABLE",
        "DATA_LOSS",
    }
)
"""Codes that are the server's fault, as OpenTelemetry's conventions for gRPC have it."""

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
"""The standard variables that say where spans go."""

_FLUSH_SECONDS = 1.0
"""How long the end of the process may wait for spans to be sent."""


def open_tracing(version: str) -> Tracing | None:
    """Begins to record spans if somebody wants them; else nothing is imported.

    Wanted are they where the environment names an endpoint, or where OpenTelemetry was
    set up in this process before.
    """
    endpoint = any(os.environ.get(name) for name in _ENDPOINTS)
    if not endpoint and "opentelemetry.trace" not in sys.modules:
        return None
    try:
        return Tracing(version, _exporting_provider() if endpoint else None)
    except ImportError as error:
        logger.warning(
            "no spans are recorded, for %s is missing; pip install 'mlx-grpc-runner[otel]'",
            error.name,
        )
        return None


def _exporting_provider() -> TracerProvider | None:
    """A provider that sends spans as the OTEL_* variables say; None if there is one."""
    from opentelemetry import trace  # noqa: PLC0415 - may be missing, as the next two may

    if not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        return None
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # noqa: PLC0415
        OTLPSpanExporter,
    )
    from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

    # OTEL_SERVICE_NAME comes before this name.
    named = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": "mlx-grpc-runner"}
    provider = TracerProvider(resource=Resource.create(named))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


class Tracing:
    """Records a span for every request. An :class:`~runner_server.telemetry.interceptor.Observer`.

    Args:
        version: The version of the server.
        provider: Where spans go. Default: the process's own, which records nothing
            until somebody sets one up.

    Making one imports the API.
    """

    def __init__(self, version: str, provider: TracerProvider | None = None) -> None:
        from opentelemetry import propagate, trace  # noqa: PLC0415 - may be missing

        self._provider = provider or trace.get_tracer_provider()
        self._tracer = self._provider.get_tracer("runner_server", version)
        self._extract = propagate.extract
        self._kind = trace.SpanKind.SERVER
        self._error = trace.StatusCode.ERROR

    def begun(self, request: CallRecord) -> None:
        """Nothing: a span is made at the end, with the time it began."""

    def ended(self, request: CallRecord) -> None:
        """Records the span, as a child of the caller's."""
        end = time.time_ns()
        span = self._tracer.start_span(
            FULL_NAMES[request.method],
            self._extract({key: text for key, text in request.headers if isinstance(text, str)}),
            self._kind,
            _rpc_attributes(request),
            start_time=end - round(request.seconds * 1e9),
        )
        if span.is_recording():
            self._describe(span, request)
            request.span_id = f"{span.get_span_context().span_id:016x}"
            request.trace_id = f"{span.get_span_context().trace_id:032x}"
        span.end(end)

    def _describe(self, span: Span, request: CallRecord) -> None:
        if request.code in _ERRORS:
            span.set_status(self._error, request.reason or None)
        if request.method in GENERATING:
            span.set_attributes(_generation_attributes(request))

    def close(self) -> None:
        """Sends what waits to be sent, as far as there is somebody to take it."""
        flush = getattr(self._provider, "force_flush", None)
        if flush:
            # An exporter tries again for longer than the end of a process may take.
            thread = threading.Thread(target=flush, daemon=True)
            thread.start()
            thread.join(_FLUSH_SECONDS)


def _rpc_attributes(request: CallRecord) -> dict[str, AttributeValue]:
    attributes: dict[str, AttributeValue] = {
        "rpc.system.name": "grpc",
        "rpc.method": FULL_NAMES[request.method],
        "rpc.response.status_code": request.code,
        "mlx_runner.id": request.id,
    }
    if request.code != "OK":
        attributes["error.type"] = request.reason or request.code
    if request.method in GENERATING:
        attributes["gen_ai.operation.name"] = "text_completion"
        attributes["gen_ai.provider.name"] = "mlx"
        attributes["gen_ai.request.model"] = request.model
    return attributes


def _generation_attributes(request: CallRecord) -> dict[str, AttributeValue]:
    attributes: dict[str, AttributeValue] = {}
    if request.request_id:
        attributes["mlx_runner.request_id"] = request.request_id
    stats = request.stats() if request.stats else None
    if stats is None:
        return attributes
    attributes |= {
        "gen_ai.usage.input_tokens": stats.prompt_count,
        "gen_ai.usage.cache_read.input_tokens": stats.cached_count,
        "gen_ai.usage.output_tokens": stats.eval_count,
        "mlx_runner.queue_seconds": stats.queue_seconds,
    }
    if stats.reason:
        attributes["gen_ai.response.finish_reasons"] = (stats.reason.value,)
    if stats.prompt_seconds is not None:
        attributes["mlx_runner.prefill_seconds"] = stats.prompt_seconds
    if stats.eval_seconds is not None:
        attributes["mlx_runner.generation_seconds"] = stats.eval_seconds
    return attributes
