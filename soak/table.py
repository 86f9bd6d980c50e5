"""How a failed call is judged: the error table of the protocol, as far as a soak may meet it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from runner_common.handshake import ERROR_DOMAIN
from soak.records import Ending, Order

MAX_RETRY_SECONDS = 60.0
"""The longest wait that a full queue may ask for, as the server's own bound is."""

_CODES = {
    "QUEUE_FULL": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "INVALID_FIELD": grpc.StatusCode.INVALID_ARGUMENT,
    "PROMPT_TOO_LONG": grpc.StatusCode.INVALID_ARGUMENT,
}
"""The reasons that have a place here. Others are in the table too, but nothing in a soak is to
cause them: they are problems."""


@dataclass(frozen=True)
class Failure:
    """What a failed call said.

    Attributes:
        code: The gRPC status.
        words: Its message.
        reason: Of its ``ErrorInfo``; empty if it has none.
        retry_seconds: Of its ``RetryInfo``; None if it has none.
    """

    code: grpc.StatusCode
    words: str
    reason: str = ""
    retry_seconds: float | None = None


def read_failure(error: grpc.aio.AioRpcError) -> Failure:
    """Reads the details of an error."""
    status: Any = rpc_status.from_call(error)  # type: ignore[arg-type]  # has what it reads
    reason, retry = "", None
    for detail in status.details if status else ():
        info, delay = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        if detail.Unpack(info) and info.domain == ERROR_DOMAIN:
            reason = info.reason
        elif detail.Unpack(delay):
            retry = delay.retry_delay.ToNanoseconds() / 1e9
    return Failure(error.code(), error.details() or "", reason, retry)


def judge(order: Order, failure: Failure) -> tuple[Ending, str]:
    """How a stream with this failure ended, and what is wrong with that; empty if nothing."""
    if failure.code is grpc.StatusCode.DEADLINE_EXCEEDED and order.deadline_seconds is not None:
        return Ending.EXPIRED, ""
    known = _CODES.get(failure.reason) is failure.code
    if known and failure.reason == order.wrong:
        return Ending.REJECTED, ""
    if known and failure.reason == "QUEUE_FULL" and not order.wrong:
        delay = failure.retry_seconds
        if delay is None or not 0 < delay <= MAX_RETRY_SECONDS:
            return Ending.REFUSED, f"a full queue said: retry in {delay} s"
        return Ending.REFUSED, ""
    meant = f", meant to be {order.wrong}" if order.wrong else ""
    return (
        Ending.FAILED,
        f"{failure.code.name} {failure.reason or 'without a reason'}{meant}: {failure.words[:200]}",
    )
