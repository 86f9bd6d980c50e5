"""Transfer of load faults between ranks."""

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
    """Return the class name, message and metadata to send for an exception."""
    if isinstance(error, RunnerFault):
        return type(error).__name__, str(error), error.metadata
    return GenerationFailed.__name__, f"loading raised {type(error).__name__}: {error}", {}


def fault_of(where: str, kind: str, text: str, metadata: dict[str, str]) -> RunnerFault:
    """Rebuild a fault from the values sent by another rank.

    Args:
        where: Name of the rank that failed.
        kind: Class name of the fault; an unknown one becomes :class:`GenerationFailed`.
        text: The fault's message.
        metadata: The fault's numbers.
    """
    return _KINDS.get(kind, GenerationFailed)(f"{where}: {text}", **metadata)
