"""Errors in the form of OpenAI's interface."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runner_common.http.problems import Problem

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    409: "conflict_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


_NAMES = (
    (re.compile(r"^options\.num_predict\b"), "max_tokens"),
    (re.compile(r"^options\.min_predict\b"), "min_tokens"),
    (re.compile(r"^options\.repeat_penalty\b"), "repetition_penalty"),
    (re.compile(r"^options\."), ""),
    (re.compile(r"^constraint\b.*"), "response_format"),
    (re.compile(r"^tool_name$"), "tool_choice"),
    (re.compile(r"^(tools\[\d+\])\.(name|description|parameters)\b"), r"\1.function.\2"),
    (re.compile(r"^inputs\b"), "input"),
    (re.compile(r"^prompt_token_ids\b"), "prompt"),
)
"""Names of fields here by those of our protocol, which the server's own errors have."""

_FIELD = re.compile(r"(?:^|(?<=; ))[\w.\[\]]+(?=: )")
"""Name of a field in the message of an error: its problem follows, and then perhaps others."""


class OpenAiDialect:
    """Errors as ``{"error": {"message", "type", "param", "code"}}``, with our reason as code."""

    def error(self, problem: Problem) -> dict[str, Any]:
        """Return the JSON object for a problem."""
        message = problem.message
        if problem.fields:
            message = _FIELD.sub(lambda found: _name(found[0]), message)
        error = {
            "message": message,
            "type": _TYPES.get(problem.status, "server_error"),
            "param": _name(problem.fields[0]) if problem.fields else None,
            "code": problem.reason,
        }
        return {"error": error | problem.metadata}

    def late_error(self, problem: Problem) -> bytes:
        """Return the last event of a failed stream."""
        return b"data: " + json.dumps(self.error(problem)).encode() + b"\n\n"


def _name(field: str) -> str:
    for pattern, name in _NAMES:
        if pattern.match(field):
            return pattern.sub(name, field)
    return field
