"""Translation of failures to faults, whose reasons telemetry records."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from runner_common.serving.auth import ForbiddenError, UnauthenticatedError
from runner_common.serving.interceptor import UnreadableRequestError
from runner_server.errors import (
    GenerationFailed,
    InvalidField,
    PermissionDenied,
    RunnerFault,
    Unauthenticated,
    reason_name,
    to_status,
)
from runner_server.telemetry.call_record import current_call

if TYPE_CHECKING:
    from google.rpc import status_pb2

logger = logging.getLogger(__name__)


def translate(error: Exception) -> status_pb2.Status:
    """Return the status for any exception of the current call, and record its reason."""
    fault = _fault(error)
    current_call().reason = reason_name(fault)
    return to_status(fault)


def _fault(error: Exception) -> RunnerFault:
    match error:
        case RunnerFault():
            return error
        case UnreadableRequestError():
            return InvalidField(error.violations)
        case UnauthenticatedError():
            return Unauthenticated(str(error))
        case ForbiddenError():
            return PermissionDenied(str(error))
    logger.error("unexpected error in a handler", exc_info=error)
    return GenerationFailed("an unexpected error; the runner's log has the traceback")
