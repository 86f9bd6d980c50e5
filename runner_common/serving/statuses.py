"""Calls of services, errors of the table as gRPC statuses, and the end of a call with one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from runner_common.contract import CODES, ERROR_DOMAIN

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from google.protobuf.message import Message

    # Calls of every service end here, so the message types are open.
    _Context = grpc.aio.ServicerContext[Any, Any]

_MAX_TEXT = 512
"""Longest message, in bytes, because the whole status must stay under 2 KB."""

_MAX_VIOLATIONS = 4


class CallContext(Protocol):
    """A call in progress. ``grpc.aio.ServicerContext`` is one, and ``HttpCall`` another."""

    async def send_initial_metadata(self, initial_metadata: Any, /) -> None:  # noqa: ANN401 - gRPC's type is private
        """Tell the caller about the acceptance of the request."""

    def invocation_metadata(self) -> Any:  # noqa: ANN401 - gRPC's type is not iterable as pairs
        """Return the headers of the call as pairs."""

    def time_remaining(self) -> float | None:
        """Return the time until the call's deadline in seconds; None without one."""

    async def abort(
        self,
        code: grpc.StatusCode,
        details: str = "",
        trailing_metadata: Any = (),  # noqa: ANN401 - as above
    ) -> NoReturn:
        """End the call with a status, by an exception."""


def error_status(
    reason: str,
    message: str,
    metadata: Mapping[str, str] | None = None,
    details: Iterable[Message] = (),
) -> status_pb2.Status:
    """Return the status sent on the wire for an error of the table, under 2 KB.

    Args:
        reason: A reason of the table.
        message: Description of the failure with its numbers, and what to do.
        metadata: The numbers for programs: lowerCamelCase keys, units in the key.
        details: Messages to send besides ``ErrorInfo``.
    """
    info = error_details_pb2.ErrorInfo(
        domain=ERROR_DOMAIN,
        reason=reason,
        metadata={key: _cut(value, 256) for key, value in (metadata or {}).items()},
    )
    # grpc.StatusCode.value is (number, name); the number is the wire's code.
    code = grpc.StatusCode[CODES[reason]].value[0]
    status = status_pb2.Status(code=code, message=_cut(message, _MAX_TEXT))
    for detail in (info, *details):
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def bad_request(violations: Sequence[tuple[str, str]]) -> error_details_pb2.BadRequest:
    """Return the detail that names fields.

    Args:
        violations: Pairs of a field's path and a description of its problem.
    """
    bad = error_details_pb2.BadRequest()
    for field, text in violations[:_MAX_VIOLATIONS]:
        bad.field_violations.add(field=_cut(field, 64), description=_cut(text, 128))
    return bad


def violations_text(violations: Sequence[tuple[str, str]]) -> str:
    """Return the message of an error that names fields."""
    return "; ".join(f"{field}: {text}" for field, text in violations)


def retry_info(seconds: float) -> error_details_pb2.RetryInfo:
    """Return the detail that says when to retry."""
    delay = duration_pb2.Duration()
    delay.FromMilliseconds(round(seconds * 1000))
    return error_details_pb2.RetryInfo(retry_delay=delay)


async def abort(context: _Context, status: status_pb2.Status) -> NoReturn:
    """End a call with a status, keeping the trailing metadata already set."""
    packed: Any = rpc_status.to_status(status)
    # Unlike abort_with_status, which would replace the trailing metadata.
    trailers = (*context.trailing_metadata(), *packed.trailing_metadata)
    await context.abort(packed.code, packed.details, trailers)
    raise AssertionError("abort returned")


def _cut(text: str, limit: int) -> str:
    """Shorten text to at most ``limit`` bytes of UTF-8 without splitting a character."""
    data = text.encode(errors="replace")
    if len(data) <= limit:
        return data.decode()
    return data[: limit - 3].decode(errors="ignore") + "..."
