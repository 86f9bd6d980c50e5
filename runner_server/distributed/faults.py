"""Transfer of load faults between ranks."""

from __future__ import annotations

from runner_server.distributed.messages import LoadFailed
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


def failure_of(error: Exception) -> LoadFailed:
    """Return the message that reports an exception of a load to rank 0."""
    if isinstance(error, RunnerFault):
        return LoadFailed(type(error).__name__, str(error), error.metadata)
    text = f"loading raised {type(error).__name__}: {error}"
    return LoadFailed(GenerationFailed.__name__, text, {})


def fault_of(where: str, failure: LoadFailed) -> RunnerFault:
    """Rebuild the fault of another rank.

    Args:
        where: Description of the rank that failed, to prefix its message.
        failure: The message; a fault of an unknown class becomes :class:`GenerationFailed`.
    """
    kind = _KINDS.get(failure.kind, GenerationFailed)
    return kind(f"{where}: {failure.text}", **failure.metadata)
