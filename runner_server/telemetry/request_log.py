"""One line per call in the log, without prompts or outputs."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable

from runner_server.telemetry.call_record import CallRecord, CallSummary

logger = logging.getLogger(__name__)

_FREQUENT_METHODS = frozenset(
    {"Status", "HealthCheck", "VllmEngine.HealthCheck", "VllmEngine.GetLoads"}
)
"""Methods whose successful calls are logged at DEBUG, because clients poll them."""

_SUMMARIZED = frozenset({"method", "code", "duration_seconds"})

_MAX_CHARS = 256
"""Longest value logged of those that callers choose."""

_PLAIN = re.compile(r"[!#-<>-~]+")
"""A value that needs no quotes: printable ASCII without space, ``"`` and ``=``."""

Fields = dict[str, str | int | float]


class RequestLine:
    """Log line of a finished call.

    Attributes:
        summary: Method, code and duration.
        fields: All fields of the call by name, including those in the summary.
    """

    def __init__(self, call: CallSummary) -> None:
        self.summary = f"{call.method} {call.code} in {call.seconds:.3f} s"
        self.fields = _fields(call)

    def __str__(self) -> str:
        """Format the line as text."""
        shown = self.fields.items()
        parts = [f"{name}={_quoted(value)}" for name, value in shown if name not in _SUMMARIZED]
        return f"{self.summary} {' '.join(parts)}"


class RequestLog:
    """Logs one line for every finished call."""

    def observe(self, call: CallRecord) -> Callable[[CallSummary], None]:  # noqa: ARG002 - interface
        """Return the handler of the call's end, which logs the call; see ``Observer.observe``."""
        return self.log

    def log(self, call: CallSummary) -> None:
        """Log the line of a call."""
        is_quiet = call.code == "OK" and call.method in _FREQUENT_METHODS
        level = logging.DEBUG if is_quiet else logging.INFO
        if logger.isEnabledFor(level):
            logger.log(level, RequestLine(call))


def _fields(call: CallSummary) -> Fields:
    known: dict[str, str | int | float | None] = {
        "id": call.id,
        "request_id": call.request_id[:_MAX_CHARS],
        "method": call.method,
        "path": call.path,
        "model": call.model[:_MAX_CHARS],
        "code": call.code,
        "reason": call.reason,
        "duration_seconds": call.seconds,
        "trace_id": call.trace_id,
        "parent_id": call.parent_id,
        "span_id": call.span_id,
    }
    if stats := call.stats:
        known |= {
            "finish_reason": stats.reason.value if stats.reason else None,
            "prompt_tokens": stats.prompt_count,
            "cached_tokens": stats.cached_count,
            "generated_tokens": stats.eval_count,
            "drafted_tokens": stats.drafted_count or None,
            "draft_accepted_tokens": stats.accepted_count if stats.drafted_count else None,
            "queue_seconds": stats.queue_seconds,
            "prefill_seconds": stats.prompt_seconds,
            "generation_seconds": stats.eval_seconds,
        }
    return {
        name: round(value, 6) if isinstance(value, float) else value
        for name, value in known.items()
        if value is not None and value != ""
    }


def _quoted(value: str | float) -> str:
    if not isinstance(value, str):
        return f"{value:.6f}" if isinstance(value, float) else str(value)
    return value if _PLAIN.fullmatch(value) else json.dumps(value)
