"""Errors that a fake runner sends."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn

import grpc
from google.rpc import error_details_pb2, status_pb2

from runner_common.contract import CODES, ERROR_DOMAIN

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from google.protobuf.message import Message


@dataclass(frozen=True)
class Failure:
    """Error that ends a call to the fake runner."""

    reason: str
    """A value of the proto's ``ErrorReason`` without its prefix; "" sends no details."""
    message: str = "the test asked for this failure"
    """The text of the status."""
    code: grpc.StatusCode | None = None
    """The gRPC code. Default: the reason's code in the proto."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """``ErrorInfo.metadata``."""
    field_violations: Sequence[tuple[str, str]] = ()
    """Pairs of a field and a description of the problem; sent as ``BadRequest``."""
    retry_delay_seconds: float | None = None
    """Sent as ``RetryInfo``."""
    domain: str = ERROR_DOMAIN
    """``ErrorInfo.domain``."""

    def abort(self, context: grpc.ServicerContext) -> NoReturn:
        """End a call with this failure."""
        code = self.code or grpc.StatusCode[CODES.get(self.reason, "UNKNOWN")]
        status = status_pb2.Status(code=code.value[0], message=self.message)
        for detail in self._details():
            status.details.add().Pack(detail)
        if status.details:
            packed = status.SerializeToString()
            context.set_trailing_metadata((("grpc-status-details-bin", packed),))
        context.abort(code, self.message)

    def _details(self) -> Iterator[Message]:
        if self.reason:
            yield error_details_pb2.ErrorInfo(
                reason=self.reason, domain=self.domain, metadata=self.metadata
            )
        if self.field_violations:
            bad = error_details_pb2.BadRequest()
            for name, description in self.field_violations:
                bad.field_violations.add(field=name, description=description)
            yield bad
        if self.retry_delay_seconds is not None:
            retry = error_details_pb2.RetryInfo()
            retry.retry_delay.FromNanoseconds(round(self.retry_delay_seconds * 1e9))
            yield retry
