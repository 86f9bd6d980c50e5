"""Errors in the form of Ollama's interface."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from runner_common.http.ollama.translation.answers import line

if TYPE_CHECKING:
    from runner_common.http.problems import Problem

_UNKNOWN_MODEL = frozenset({"MODEL_NOT_FOUND", "MODEL_NOT_LOADED"})


class OllamaDialect:
    """Errors as ``{"error": "..."}``, also as the last line of a stream."""

    def error(self, problem: Problem) -> dict[str, Any]:
        """Return the JSON object for a problem."""
        text = problem.message
        # Programs look for these words, to pull the model then.
        if problem.status == 404 and problem.reason in _UNKNOWN_MODEL:
            text = f"model {problem.metadata.get('model', '')!r} not found: {text}"
        return {"error": text}

    def late_error(self, problem: Problem) -> bytes:
        """Return the last line of a failed stream."""
        return line(self.error(problem))
