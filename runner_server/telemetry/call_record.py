"""Telemetry record of one RPC: the source of log line, metrics and span."""

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


@dataclass(eq=False)
class CallRecord:
    """A call from arrival to end. Used on the event loop only.

    Attributes:
        method: Name of the rpc, without the service.
        id: The caller's ``x-request-id``, or a random one.
        headers: Metadata sent with the call; may include a token.
        trace_id: Trace id of the caller's W3C trace context; empty without a valid one.
        parent_id: Span id of the caller in that context.
        request_id: Name given in the request itself, not validated yet.
        model: Name of the model the call is about.
        stats: Returns the statistics of the call's completion; thread-safe.
        started: Arrival time, in ``time.monotonic()`` seconds.
        code: Name of the gRPC code; empty until the call has ended.
        reason: ``ErrorReason`` of the failure, if any.
        seconds: Duration of the call.
        span_id: Id of the span recorded for the call.
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
    code: str = ""
    reason: str = ""
    seconds: float = 0.0
    span_id: str = ""

    @classmethod
    def arrived(cls, method: str, headers: Headers) -> CallRecord:
        """Create the record of a new call."""
        given = dict(headers)
        trace_id, parent_id = _trace(given.get(_TRACE_HEADER))
        return cls(method, _id(given.get(ID_HEADER)), headers, trace_id, parent_id)

    def end(self, code: str) -> None:
        """Record the outcome and duration of the call."""
        self.code, self.seconds = code, time.monotonic() - self.started


_current: ContextVar[CallRecord | None] = ContextVar("request", default=None)


def enter(request: CallRecord) -> None:
    """Make a record the current one of this task."""
    _current.set(request)


def current_call() -> CallRecord:
    """Return the record of the current task's call; outside of a call, an unused record."""
    return _current.get() or CallRecord("", "")


def _id(given: str | bytes | None) -> str:
    # The id goes into the log as is.
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
