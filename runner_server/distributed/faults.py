"""Faults of a load on another rank, over the link and back."""

from __future__ import annotations

from runner_server.errors import (
    GenerationFailed,
    InsufficientMemory,
    ModelNotFound,
    ModelUnsupported,
    RunnerFault,
)

_KINDS = {
    kind.__name__: kind
    for kind in (GenerationFailed, InsufficientMemory, ModelNotFound, ModelUnsupported)
}


def fault_values(error: Exception) -> tuple[str, str, dict[str, str]]:
    """What is sent of a fault: kind, words, numbers."""
    if isinstance(error, RunnerFault):
        return type(error).__name__, str(error), error.metadata
    return GenerationFailed.__name__, f"loading raised {type(error).__name__}: {error}", {}


def fault_of(where: str, kind: str, text: str, metadata: dict[str, str]) -> RunnerFault:
    """The fault that was sent.

    Args:
        where: Which rank it is of, in words.
        kind: The name of its class; any other than those of a load counts as a failure.
        text: Its words.
        metadata: Its numbers.
    """
    return _KINDS.get(kind, GenerationFailed)(f"{where}: {text}", **metadata)
