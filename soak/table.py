"""Classification of failed calls by the error table of the protocol."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from runner_common.contract import ERROR_DOMAIN
from soak.records import Ending, Order

MAX_RETRY_SECONDS = 60.0
"""Longest retry delay that a full queue may give; the server has the same bound."""

_CODES = {
    "QUEUE_FULL": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "INVALID_FIELD": grpc.StatusCode.INVALID_ARGUMENT,
    "PROMPT_TOO_LONG": grpc.StatusCode.INVALID_ARGUMENT,
}
"""Status codes of the error reasons that a soak provokes. Any other reason is a problem."""


@dataclass(frozen=True)
class Failure:
    """Status of a failed call.

    Attributes:
        code: gRPC status code.
        message: Status message.
        reason: Reason in the ``ErrorInfo``; empty without one.
        retry_seconds: Delay in the ``RetryInfo``; None without one.
    """

    code: grpc.StatusCode
    message: str
    reason: str = ""
    retry_seconds: float | None = None


def read_failure(error: grpc.aio.AioRpcError) -> Failure:
    """Parse the status details of an error."""
    status: Any = rpc_status.from_call(error)  # type: ignore[arg-type]  # duck-typed
    reason, retry = "", None
    for detail in status.details if status else ():
        info, delay = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        if detail.Unpack(info) and info.domain == ERROR_DOMAIN:
            reason = info.reason
        elif detail.Unpack(delay):
            retry = delay.retry_delay.ToNanoseconds() / 1e9
    return Failure(error.code(), error.details() or "", reason, retry)


def judge(order: Order, failure: Failure) -> tuple[Ending, str]:
    """Return the ending for a failed stream and a description of the problem, if any."""
    if failure.code is grpc.StatusCode.DEADLINE_EXCEEDED and order.deadline_seconds is not None:
        return Ending.EXPIRED, ""
    known = _CODES.get(failure.reason) is failure.code
    if known and failure.reason == order.expected_reason:
        return Ending.REJECTED, ""
    if known and failure.reason == "QUEUE_FULL" and not order.expected_reason:
        delay = failure.retry_seconds
        if delay is None or not 0 < delay <= MAX_RETRY_SECONDS:
            return Ending.REFUSED, f"QUEUE_FULL with an invalid retry delay: {delay} s"
        return Ending.REFUSED, ""
    expected = f", expected {order.expected_reason}" if order.expected_reason else ""
    reason = failure.reason or "without a reason"
    return Ending.FAILED, f"{failure.code.name} {reason}{expected}: {failure.message[:200]}"
