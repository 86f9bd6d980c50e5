"""Errors in the form of OpenAI's interface."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runner_common.http.problems import Problem

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    409: "conflict_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class OpenAiDialect:
    """Errors as ``{"error": {"message", "type", "param", "code"}}``, with our reason as code."""

    def error(self, problem: Problem) -> dict[str, Any]:
        """Return the JSON object for a problem."""
        error = {
            "message": problem.message,
            "type": _TYPES.get(problem.status, "server_error"),
            "param": problem.fields[0] if problem.fields else None,
            "code": problem.reason,
        }
        return {"error": error | problem.metadata}

    def late_error(self, problem: Problem) -> bytes:
        """Return the last event of a failed stream."""
        return b"data: " + json.dumps(self.error(problem)).encode() + b"\n\n"
