"""Classification of failed leases: which refusals and timeouts a pool may give."""

from __future__ import annotations

from dataclasses import dataclass

from runner_client import InsufficientMemoryError, RunnerError, RunnerTimeoutError
from soak.pool.records import PoolOrder
from soak.records import Ending

_EARLY_SECONDS = 0.05
"""Tolerance of timers."""


@dataclass(frozen=True, slots=True)
class Look:
    """State of a pool, as seen by a caller that is about to ask, or was just refused.

    Attributes:
        is_ready: Whether the model is loaded.
        has_room: Whether the model fits into the rest of the budget, and no other request waits.
    """

    is_ready: bool = False
    has_room: bool = False


def judge(
    order: PoolOrder, error: RunnerError, seconds: float, before: Look, after: Look
) -> tuple[Ending, str]:
    """Return the ending of a failed request, and a description of the problem, if any.

    Args:
        order: The request.
        error: Its error.
        seconds: Time from sending the request to the error.
        before: The pool just before the request.
        after: The pool just after the error.
    """
    if isinstance(error, InsufficientMemoryError):
        wrong = _wrong_refusal(order, error, before, after)
        return (Ending.WRONGLY_REFUSED if wrong else Ending.DECLINED), wrong
    if isinstance(error, RunnerTimeoutError) and error.phase == "load":
        limit = order.timeout_seconds
        if limit is not None and seconds >= limit - _EARLY_SECONDS:
            return Ending.EXPIRED, ""
    return Ending.FAILED, f"{order.model}: {type(error).__name__} after {seconds:.2f} s: {error}"


def _wrong_refusal(
    order: PoolOrder, error: InsufficientMemoryError, before: Look, after: Look
) -> str:
    """Describe why a refusal is wrong; return an empty string if it is justified."""
    if order.may_evict and not order.may_be_short:
        why = "although the models in its way may go"
    elif before.is_ready and after.is_ready:
        why = "although it was loaded"
    elif before.has_room and after.has_room:
        why = "although there was room"
    elif error.required_bytes is None or error.available_bytes is None:
        why = "without the numbers"
    elif error.required_bytes <= error.available_bytes:
        why = f"although {error.available_bytes:,} bytes were available"
    else:
        return ""
    return f"{order.model} was refused {why}: {error}"
