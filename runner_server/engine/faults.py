"""Faults that the engine raises or hands to its callers."""

from __future__ import annotations

import logging

from runner_server.engine.backend import BackendLost
from runner_server.engine.types import Failure, LoadSpec, NoLegalToken
from runner_server.errors import (
    GenerationFailed,
    InvalidField,
    RunnerFault,
    ShuttingDown,
    not_finite_advice,
)

logger = logging.getLogger(__name__)


def stopping_fault() -> ShuttingDown:
    """Return the fault of calls while the process stops."""
    return ShuttingDown("the runner is stopping; use another")


def draining_fault() -> ShuttingDown:
    """Return the fault of new requests while the engine drains, and afterwards."""
    return ShuttingDown("the runner is draining; use another, or load a model here again")


def exiting_fault() -> ShuttingDown:
    """Return the fault of new calls once the engine is dead."""
    return ShuttingDown("the engine has failed and the runner is exiting; use another")


def death_faults(error: BaseException) -> tuple[str, RunnerFault, RunnerFault]:
    """Return why the engine dies, the fault of its requests, and that of later calls."""
    if isinstance(error, BackendLost):
        lost = ShuttingDown(str(error))
        return str(error), lost, lost
    refusal = exiting_fault()
    text = f"the engine failed: {type(error).__name__}: {error}"
    return text, GenerationFailed(str(refusal)), refusal


def step_fault(error: Exception) -> GenerationFailed:
    """Return the fault of the requests of a batch whose step raised."""
    return GenerationFailed(
        f"MLX raised {type(error).__name__} in a step of this batch; the runner's log has the "
        "traceback; the request may be retried"
    )


def row_fault(failure: Failure, length: int, dtype: str) -> RunnerFault:
    """Return the fault of a request whose row must end.

    Args:
        failure: The cause.
        length: Tokens of the sequence.
        dtype: Format of the weights in memory.
    """
    if isinstance(failure, NoLegalToken):
        text = f"no token can continue the text after {length} tokens, prompt included"
        return InvalidField([("constraint", f"{text}: {failure.reason}")])
    return GenerationFailed(
        f"the model's logits are not finite (NaN or infinity) after {length} "
        f"tokens, so no token can be sampled; its weights are held as {dtype}: "
        f"{not_finite_advice(dtype)}"
    )


def vector_fault(dtype: str) -> GenerationFailed:
    """Return the fault of a request to embed whose vector is not finite.

    Args:
        dtype: Format of the weights in memory.
    """
    return GenerationFailed(
        "the vector of a text is not finite (NaN or infinity); the model's weights are held as "
        f"{dtype}: {not_finite_advice(dtype)}"
    )


def load_fault(spec: LoadSpec, error: Exception) -> RunnerFault:
    """Log a failed load; return the fault without tracebacks, which would keep arrays alive."""
    if isinstance(error, RunnerFault):
        fault = error
        # %r, because a name with line breaks could forge log lines.
        logger.warning("load of %r failed: %s", spec.model, fault)
    else:
        logger.error("load of %r failed", spec.model, exc_info=error)
        fault = GenerationFailed(
            f"loading {spec.model!r} raised {type(error).__name__}; the runner's log has the "
            "traceback"
        )
    fault.__cause__ = fault.__context__ = fault.__traceback__ = error.__traceback__ = None
    return fault
