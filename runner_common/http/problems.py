"""HTTP statuses of the error table."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grpc
from google.rpc import error_details_pb2

if TYPE_CHECKING:
    from google.rpc import status_pb2

HTTP_STATUSES = {
    "INVALID_FIELD": 400,
    "PROMPT_TOO_LONG": 400,
    "MODEL_NOT_FOUND": 404,
    "MODEL_UNSUPPORTED": 400,
    # 404 if another model is loaded; see ``problem_of``.
    "MODEL_NOT_LOADED": 503,
    "BUSY": 409,
    "INSUFFICIENT_MEMORY": 507,
    "QUEUE_FULL": 429,
    "SHUTTING_DOWN": 503,
    "GENERATION_FAILED": 500,
    "UNAUTHENTICATED": 401,
    "ABORTED": 409,
    "PERMISSION_DENIED": 403,
}
"""Statuses by the reasons of the error table."""

_CODES = {
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 413,
    grpc.StatusCode.UNIMPLEMENTED: 501,
}
"""Statuses of errors without a reason, by the code. gRPC itself exhausts no other resource than the
size of a message."""

_BY_NUMBER = {code.value[0]: code for code in grpc.StatusCode}

_NOT_RETRIED = frozenset({"ABORTED", "INSUFFICIENT_MEMORY"})
"""Reasons whose HTTP statuses clients would retry on their own, in vain."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A failure in terms of HTTP.

    Attributes:
        status: HTTP status.
        reason: Reason of the error table, or the name of a gRPC code.
        message: Description of the failure with its numbers, and what to do.
        fields: Paths of the fields at fault; empty if none is.
        metadata: The numbers for programs, as in ``ErrorInfo``.
        retry_seconds: Time after which to retry; None if it is unknown.
    """

    status: int
    reason: str
    message: str
    fields: tuple[str, ...] = ()
    metadata: dict[str, str] = field(default_factory=dict)
    retry_seconds: float | None = None

    def headers(self) -> dict[str, str]:
        """Return the headers of the response."""
        found: dict[str, str] = {}
        if self.retry_seconds is not None:
            # `retry-after-ms` is read by OpenAI's clients.
            found["retry-after"] = str(max(1, math.ceil(self.retry_seconds)))
            found["retry-after-ms"] = str(round(self.retry_seconds * 1000))
        if self.reason in _NOT_RETRIED:
            found["x-should-retry"] = "false"
        if self.reason == "UNAUTHENTICATED":
            found["www-authenticate"] = "Bearer"
        return found


def problem_of(status: status_pb2.Status, *, is_ready: bool) -> Problem:
    """Return the problem of a status.

    Args:
        status: A status of the error table, or one of gRPC itself.
        is_ready: Whether requests are accepted now. If so, a model that is not loaded is another
            one than the loaded one.
    """
    code = _BY_NUMBER.get(status.code, grpc.StatusCode.UNKNOWN)
    info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), None
    for detail in status.details:
        if detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            delay = error_details_pb2.RetryInfo.FromString(detail.value).retry_delay
            retry = delay.ToNanoseconds() / 1e9
        else:
            # Unpacks a detail of the target's type, and ignores any other.
            detail.Unpack(info)
            detail.Unpack(bad)
    http_status = HTTP_STATUSES.get(info.reason, _CODES.get(code, 500))
    if info.reason == "MODEL_NOT_LOADED" and is_ready:
        http_status = 404
    return Problem(
        http_status,
        info.reason or code.name,
        status.message,
        tuple(violation.field for violation in bad.field_violations),
        dict(info.metadata),
        retry,
    )
