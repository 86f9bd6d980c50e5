"""Translation of gRPC errors to the exceptions in ``errors``, for both clients.

The reason in ``google.rpc.ErrorInfo`` selects the class. Without a known reason, the gRPC
code does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from runner_client import errors
from runner_common.contract import ERROR_DOMAIN, ERRORS

_DETAILS_KEY = "grpc-status-details-bin"

_BY_REASON: dict[str, type[errors.RunnerError]] = {
    rule.reason: getattr(errors, rule.exception) for rule in ERRORS
}

_BY_CODE: dict[grpc.StatusCode, type[errors.RunnerError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidRequestError,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.RunnerTimeoutError,
    grpc.StatusCode.UNAVAILABLE: errors.RunnerUnavailableError,
    # Calls cancelled by their caller never get here: the channel was closed, or the server gave
    # up the call.
    grpc.StatusCode.CANCELLED: errors.RunnerUnavailableError,
    grpc.StatusCode.UNIMPLEMENTED: errors.NotSupportedError,
    # From a proxy in front of the runner, for instance.
    grpc.StatusCode.UNAUTHENTICATED: errors.AuthenticationError,
    grpc.StatusCode.PERMISSION_DENIED: errors.PermissionDeniedError,
}

_EXPLANATIONS = {
    grpc.StatusCode.DEADLINE_EXCEEDED: "the runner at {address} did not answer in time",
    grpc.StatusCode.UNAVAILABLE: "cannot reach the runner at {address}",
    grpc.StatusCode.CANCELLED: "the call to the runner at {address} was cut off",
    grpc.StatusCode.UNIMPLEMENTED: "the runner at {address} does not offer this call",
}


_LOST = re.compile(
    "Socket closed|Stream removed|Connection reset|recvmsg:|sendmsg:|Broken pipe|.*GOAWAY"
)
"""Messages of gRPC about a connection that was established and then lost."""

_HANDSHAKES = (
    (
        re.compile("WRONG_VERSION_NUMBER"),
        True,
        "the runner at {address} does not encrypt: call it without certificates (TlsFiles)",
    ),
    (
        re.compile("CERTIFICATE_VERIFY_FAILED"),
        True,
        (
            "the certificate of the runner at {address} was not signed by a trusted authority: "
            "give the certificate of the authority that signed it (TlsFiles)"
        ),
    ),
    (
        re.compile(r"failed to connect to all addresses.*(Socket closed|Connection reset)"),
        False,
        (
            "the runner at {address} closes unencrypted connections: if it encrypts, give the "
            "certificate of the authority to trust it by (TlsFiles)"
        ),
    ),
)
"""gRPC's message for a failed handshake, whether the connection uses TLS, and the explanation."""


@dataclass
class _Details:
    """Details of a server's error, apart from code and message."""

    reason: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    field_violations: list[tuple[str, str]] = field(default_factory=list)
    retry_delay_seconds: float | None = None


def translate(
    error: grpc.RpcError,
    *,
    address: str,
    timeout_seconds: float | None = None,
    is_encrypted: bool = False,
) -> errors.RunnerError:
    """Return the exception for a failed call.

    Args:
        error: The error raised by gRPC, from a sync or an asyncio call.
        address: The runner's address, for the message.
        timeout_seconds: The deadline of the call, for ``RunnerTimeoutError``.
        is_encrypted: Whether the connection uses TLS.
    """
    details = _read_details(error)
    known = _BY_REASON.get(details.reason or "")
    kind = known or _BY_CODE.get(error.code(), errors.RunnerError)
    return kind(
        _message(error, address, is_encrypted) if details.reason is None else _said(error),
        reason=details.reason,
        code=error.code(),
        metadata=details.metadata,
        **_fields(kind, details, timeout_seconds),
    )


def _said(error: grpc.RpcError) -> str:
    return error.details() or error.code().name


def _message(error: grpc.RpcError, address: str, is_encrypted: bool) -> str:
    """Explain an error that did not come from the runner itself."""
    said = _said(error)
    if error.code() not in _EXPLANATIONS:
        return said
    for pattern, encrypted, explanation in _HANDSHAKES:
        if encrypted == is_encrypted and pattern.search(said):
            return explanation.format(address=address)
    if _LOST.match(said):
        return f"the connection to the runner at {address} was lost: {said}"
    return f"{_EXPLANATIONS[error.code()].format(address=address)}: {said}"


def _fields(
    kind: type[errors.RunnerError], details: _Details, timeout_seconds: float | None
) -> dict[str, Any]:
    """Return the attributes specific to ``kind``."""
    numbers = details.metadata
    fields: dict[str, Any] = {}
    if issubclass(kind, errors.InvalidRequestError):
        fields["field_violations"] = details.field_violations
    if issubclass(kind, errors.PromptTooLongError):
        fields["prompt_tokens"] = _number(numbers.get("promptTokens"))
        fields["context_length"] = _number(numbers.get("contextLength"))
    elif issubclass(kind, errors.ModelError):
        fields["model"] = numbers.get("model")
    elif issubclass(kind, errors.InsufficientMemoryError):
        fields["required_bytes"] = _number(numbers.get("requiredBytes"))
        fields["available_bytes"] = _number(numbers.get("availableBytes"))
    elif issubclass(kind, errors.QueueFullError):
        fields["retry_delay_seconds"] = details.retry_delay_seconds
    elif issubclass(kind, errors.RunnerTimeoutError):
        fields["timeout_seconds"] = timeout_seconds
    return fields


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() else None


def _read_details(error: grpc.RpcError) -> _Details:
    status = status_pb2.Status()
    try:
        status.ParseFromString(_packed_details(error))
        return _unpack(status)
    except DecodeError:
        # Not from a runner: something between client and runner answered.
        return _Details()


def _packed_details(error: grpc.RpcError) -> bytes:
    # A sync error has pairs here, an asyncio error a Metadata object; both iterate as pairs.
    trailers: Any = error.trailing_metadata() or ()
    return next((bytes(value) for key, value in trailers if key == _DETAILS_KEY), b"")


def _unpack(status: status_pb2.Status) -> _Details:
    details = _Details()
    info = error_details_pb2.ErrorInfo()
    bad = error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    for packed in status.details:
        if packed.Unpack(info) and info.domain == ERROR_DOMAIN:
            details.reason = info.reason
            details.metadata = dict(info.metadata)
        elif packed.Unpack(bad):
            details.field_violations = [(v.field, v.description) for v in bad.field_violations]
        elif packed.Unpack(retry):
            delay = retry.retry_delay
            details.retry_delay_seconds = delay.seconds + delay.nanos / 1e9
    return details
