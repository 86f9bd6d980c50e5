"""OpenTelemetry spans, recorded only if the API is installed and tracing is configured."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from runner_common.extras import install_advice
from runner_server.engine.types import GenerationStats
from runner_server.telemetry.call_record import CallRecord, CallSummary
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
"""Codes that are errors of the server by OpenTelemetry's conventions for gRPC."""

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
"""The standard environment variables for the destination of spans."""

_FLUSH_SECONDS = 1.0
"""Longest wait at process exit for spans to be sent."""


def open_tracing(version: str) -> Tracing | None:
    """Start recording spans if tracing is configured; otherwise import nothing and return None.

    Tracing is configured if the environment names an endpoint, or if OpenTelemetry has already
    been imported in this process.
    """
    endpoint = any(os.environ.get(name) for name in _ENDPOINTS)
    if not endpoint and "opentelemetry.trace" not in sys.modules:
        return None
    try:
        return Tracing(version, _exporting_provider() if endpoint else None)
    except ImportError as error:
        logger.warning(
            "no spans are recorded because %s is missing; %s", error.name, install_advice("otel")
        )
        return None


def _exporting_provider() -> TracerProvider | None:
    """Return a provider configured by the OTEL_* variables; None if one is already set."""
    from opentelemetry import trace  # noqa: PLC0415 - may be missing, as the next two may

    if not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        return None
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # noqa: PLC0415
        OTLPSpanExporter,
    )
    from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

    # OTEL_SERVICE_NAME takes precedence over this name.
    named = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": "mlx-grpc-runner"}
    provider = TracerProvider(resource=Resource.create(named))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


class Tracing:
    """Records a span for every call, as an ``Observer`` of the telemetry interceptor.

    Creating an instance imports the OpenTelemetry API.

    Args:
        version: The version of the server.
        provider: Destination of spans. Default: the process's own provider, which records
            nothing until one is set up.
    """

    def __init__(self, version: str, provider: TracerProvider | None = None) -> None:
        from opentelemetry import propagate, trace  # noqa: PLC0415 - may be missing

        self._provider = provider or trace.get_tracer_provider()
        self._tracer = self._provider.get_tracer("runner_server", version)
        self._extract = propagate.extract
        self._kind = trace.SpanKind.SERVER
        self._error = trace.StatusCode.ERROR

    def observe(self, call: CallRecord) -> Callable[[CallSummary], None]:
        """Start a span as a child of the caller's, and put its ids into the record."""
        begin = time.time_ns()
        span = self._tracer.start_span(
            call.path or FULL_NAMES[call.method],
            self._extract({key: text for key, text in call.headers if isinstance(text, str)}),
            self._kind,
            _arrival_attributes(call),
            start_time=begin,
        )
        if span.is_recording():
            call.span_id = f"{span.get_span_context().span_id:016x}"
            call.trace_id = f"{span.get_span_context().trace_id:032x}"
        return partial(self._end, span, begin)

    def _end(self, span: Span, begin: int, call: CallSummary) -> None:
        if span.is_recording():
            span.set_attributes(_outcome_attributes(call))
            if call.code in _ERRORS:
                span.set_status(self._error, call.reason or None)
        # Not the current time: the wall clock may have been set during the call.
        span.end(begin + round(call.seconds * 1e9))

    def close(self) -> None:
        """Send pending spans, waiting at most a second."""
        flush = getattr(self._provider, "force_flush", None)
        if flush:
            # In a thread, because an exporter may retry for longer than an exit may take.
            thread = threading.Thread(target=flush, daemon=True)
            thread.start()
            thread.join(_FLUSH_SECONDS)


def _arrival_attributes(call: CallRecord) -> dict[str, AttributeValue]:
    attributes: dict[str, AttributeValue] = {
        "rpc.method": FULL_NAMES[call.method],
        "mlx_runner.id": call.id,
    }
    if call.path:
        attributes["http.route"] = call.path
    else:
        attributes["rpc.system.name"] = "grpc"
    if call.method in GENERATING:
        attributes["gen_ai.operation.name"] = "text_completion"
        attributes["gen_ai.provider.name"] = "mlx"
    return attributes


def _outcome_attributes(call: CallSummary) -> dict[str, AttributeValue]:
    attributes: dict[str, AttributeValue] = {"rpc.response.status_code": call.code}
    if call.code != "OK":
        attributes["error.type"] = call.reason or call.code
    if call.method in GENERATING:
        attributes["gen_ai.request.model"] = call.model
        if call.request_id:
            attributes["mlx_runner.request_id"] = call.request_id
    if call.stats:
        attributes |= _generation_attributes(call.stats)
    return attributes


def _generation_attributes(stats: GenerationStats) -> dict[str, AttributeValue]:
    attributes: dict[str, AttributeValue] = {
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
