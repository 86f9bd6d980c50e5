"""Telemetry record of one RPC, and the summary for log line, metrics and span."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field

from runner_server.engine.types import GenerationStats

ID_HEADER = "x-request-id"
"""Header with the id of a call, in both directions."""

_TRACE_HEADER = "traceparent"

_ID = re.compile(r"[!-~]{1,128}")

_TRACE = re.compile(r"(?!ff)[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(-.*)?")
"""https://www.w3.org/TR/trace-context/#traceparent-header; later versions may append fields."""

Headers = Sequence[tuple[str, str | bytes]]


@dataclass(frozen=True, slots=True)
class CallSummary:
    """Summary of an ended call.

    Attributes:
        method: Name of the rpc, without the service.
        id: The caller's ``x-request-id``, or a random id.
        code: Name of the gRPC code.
        seconds: Duration of the call.
        reason: ``ErrorReason`` of the failure, if any.
        request_id: The caller's ``request_id`` in the request itself, not validated.
        model: Name of the model that the call is about.
        stats: Statistics of the call's completion, if any.
        trace_id: Trace id of the call; empty without one.
        parent_id: Span id of the caller in that trace.
        span_id: Id of the span recorded for the call.
        path: Path of the route of an HTTP call; empty for gRPC.
    """

    method: str
    id: str
    code: str
    seconds: float
    reason: str = ""
    request_id: str = ""
    model: str = ""
    stats: GenerationStats | None = None
    trace_id: str = ""
    parent_id: str = ""
    span_id: str = ""
    path: str = ""


@dataclass(eq=False)
class CallRecord:
    """Record of a call in progress, filled by each layer handling the call, on the event loop only.

    Attributes:
        method: Name of the rpc, without the service.
        id: The caller's ``x-request-id``, or a random id.
        headers: Metadata sent with the call; may include a token.
        trace_id: Trace id of the caller's W3C trace context, or of the span; empty without one.
        parent_id: Span id of the caller in that context.
        request_id: The caller's ``request_id`` in the request itself, not validated.
        model: Name of the model that the call is about.
        stats: Returns the statistics of the call's completion; thread-safe.
        started: Arrival time, in ``time.monotonic()`` seconds.
        reason: ``ErrorReason`` of the failure, if any.
        span_id: Id of the span recorded for the call.
        path: Path of the route of an HTTP call; empty for gRPC.
    """

    method: str
    id: str
    headers: Headers = field(default=(), repr=False)
    trace_id: str = ""
    parent_id: str = ""
    request_id: str = ""
    model: str = ""
    stats: Callable[[], GenerationStats] | None = None
    started: float = field(default_factory=time.monotonic)
    reason: str = ""
    span_id: str = ""
    path: str = ""

    @classmethod
    def arrived(cls, method: str, headers: Headers, path: str = "") -> CallRecord:
        """Create the record of a new call."""
        given = dict(headers)
        trace_id, parent_id = _trace(given.get(_TRACE_HEADER))
        id_ = _id(given.get(ID_HEADER))
        return cls(method, id_, headers, trace_id, parent_id, path=path)

    def end(self, code: str) -> CallSummary:
        """End the call now, and return the summary.

        Args:
            code: Name of the gRPC code that the call ended with.
        """
        return CallSummary(
            method=self.method,
            id=self.id,
            code=code,
            seconds=time.monotonic() - self.started,
            reason=self.reason,
            request_id=self.request_id,
            model=self.model,
            stats=self.stats() if self.stats else None,
            trace_id=self.trace_id,
            parent_id=self.parent_id,
            span_id=self.span_id,
            path=self.path,
        )


_current: ContextVar[CallRecord | None] = ContextVar("request", default=None)


def enter(request: CallRecord) -> None:
    """Make a record the current one in this task's context."""
    _current.set(request)


def current_call() -> CallRecord:
    """Return the record of the current call; outside of a call, an unused record."""
    return _current.get() or CallRecord("", "")


def _id(given: str | bytes | None) -> str:
    # Only plain ASCII, because the id goes into the log as is.
    if isinstance(given, str) and _ID.fullmatch(given):
        return given
    return secrets.token_hex(8)


def _trace(given: str | bytes | None) -> tuple[str, str]:
    found = _TRACE.fullmatch(given) if isinstance(given, str) else None
    if not found or (found[3] and given and given[:2] == "00"):
        return "", ""
    trace_id, parent_id = found[1], found[2]
    if not trace_id.strip("0") or not parent_id.strip("0"):
        return "", ""
    return trace_id, parent_id
