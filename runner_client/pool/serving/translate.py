"""Statuses of the error table for the exceptions of a pool."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from runner_client.errors import (
    InsufficientMemoryError,
    InvalidRequestError,
    ModelError,
    RunnerError,
    RunnerUnavailableError,
)
from runner_common.contract import CODES, ERRORS
from runner_common.serving.auth import ForbiddenError, UnauthenticatedError
from runner_common.serving.interceptor import UnreadableRequestError
from runner_common.serving.statuses import bad_request, error_status, violations_text
from runner_common.serving.unknown_fields import WHOLE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from google.rpc import status_pb2

logger = logging.getLogger(__name__)

_REASONS = {rule.exception: rule.reason for rule in ERRORS}


def translate(error: Exception) -> status_pb2.Status:
    """Return the status for any exception of a call."""
    match error:
        case UnreadableRequestError():
            return _invalid(violations_text(error.violations), error.violations)
        case UnauthenticatedError():
            return error_status("UNAUTHENTICATED", str(error))
        case ForbiddenError():
            return error_status("PERMISSION_DENIED", str(error))
        case InvalidRequestError():
            text = str(error)
            return _invalid(text, error.field_violations or ((WHOLE, text),))
        case RunnerError():
            return error_status(_reason(error), str(error), _metadata(error))
    logger.error("unexpected error in a handler", exc_info=error)
    return error_status(
        "GENERATION_FAILED", "an unexpected error; the pool's log has the traceback"
    )


def _invalid(text: str, violations: Sequence[tuple[str, str]]) -> status_pb2.Status:
    return error_status("INVALID_FIELD", text, details=(bad_request(violations),))


def _reason(error: RunnerError) -> str:
    if error.reason in CODES:
        return str(error.reason)
    if isinstance(error, RunnerUnavailableError):
        return "SHUTTING_DOWN"
    named = (_REASONS.get(kind.__name__) for kind in type(error).__mro__)
    return next(filter(None, named), "GENERATION_FAILED")


def _metadata(error: RunnerError) -> dict[str, str]:
    if error.metadata:
        return error.metadata
    match error:
        case ModelError(model=str(model)):
            return {"model": model}
        case InsufficientMemoryError(required_bytes=int(required), available_bytes=int(available)):
            return {"requiredBytes": str(required), "availableBytes": str(available)}
    return {}
