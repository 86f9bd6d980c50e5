"""One call as it is told to the outside: its log line, its metrics, its span."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field

from runner_server.engine.types import GenerationStats

ID_HEADER = "x-request-id"
"""Names a call, in both directions."""

_TRACE_HEADER = "traceparent"

_ID = re.compile(r"[!-~]{1,128}")

_TRACE = re.compile(r"(?!ff)[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(-.*)?")
"""https://www.w3.org/TR/trace-context/#traceparent-header; later versions may append fields."""

Headers = Sequence[tuple[str, str | bytes]]


@dataclass(eq=False)
class CallRecord:
    """A call from its arrival to its end. It belongs to the event loop.

    Attributes:
        method: The name of the rpc, without the service.
        id: The caller's ``x-request-id``, or one drawn here.
        headers: The metadata that came with it; a token may be in it.
        trace_id: Of the caller's W3C trace context; empty without a valid one.
        parent_id: The caller's span in it.
        request_id: The name in the request itself, not checked yet.
        model: The model it is about.
        stats: What its completion has come to; any thread may ask.
        started: When it came, in ``time.monotonic()`` seconds.
        code: The name of its gRPC code; empty until it has ended.
        reason: The ``ErrorReason`` it failed with.
        seconds: How long it took.
        span_id: Of the span that was recorded for it.
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
        """Makes the record of a call that has just come."""
        given = dict(headers)
        trace_id, parent_id = _trace(given.get(_TRACE_HEADER))
        return cls(method, _id(given.get(ID_HEADER)), headers, trace_id, parent_id)

    def end(self, code: str) -> None:
        """Notes how and when it ended."""
        self.code, self.seconds = code, time.monotonic() - self.started


_current: ContextVar[CallRecord | None] = ContextVar("request", default=None)


def enter(request: CallRecord) -> None:
    """Makes a request the current one of this task."""
    _current.set(request)


def current_call() -> CallRecord:
    """The request that this task handles; outside of one, a record that nobody reads."""
    return _current.get() or CallRecord("", "")


def _id(given: str | bytes | None) -> str:
    # Whatever stands in it goes into the log.
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
