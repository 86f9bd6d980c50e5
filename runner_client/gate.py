"""The memory gate: does a model fit, decided before a process is started for it."""

from __future__ import annotations

import os
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mlxrunner.hostmemory import FreeMemory, free_memory
from mlxrunner.units import format_bytes
from runner_client.errors import (
    InsufficientMemoryError,
    InvalidRequestError,
    LoadRequiresFullError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from runner_client.estimate import MemoryEstimate

OVERHEAD_VARIABLE = "MLX_RUNNER_GPU_OVERHEAD"
"""Bytes to keep free beside the minimum, for other users of the device."""

METAL_MINIMUM_BYTES = 512 * 1024**2
"""Kept free on Metal for what no model's size tells: the figure of the original gate."""

MINIMUM_BYTES = 457 * 1024**2
"""The same on every other device."""

SETTLE_SECONDS = 1.0
"""Wait before the second measurement: a runner just stopped frees its memory late."""


@dataclass(frozen=True, slots=True)
class GateDecision:
    """One decision, with the numbers it rests on.

    Attributes:
        fits: Whether the need is at most what is available.
        required_bytes: The need.
        available_bytes: Free memory less overhead and reservations, never negative.
        overhead_bytes: Kept back: the device's minimum and the configured overhead.
        reserved_bytes: Promised by this gate to models that are still loading.
        free: The measurement.
        overridden: It does not fit and the caller goes on all the same.
    """

    fits: bool
    required_bytes: int
    available_bytes: int
    overhead_bytes: int
    reserved_bytes: int
    free: FreeMemory
    overridden: bool = False


class MemoryGate:
    """Compares what a model needs with what is free.

    A model is let through if its need is at most the free memory of the first
    device less an overhead. Free memory is measured absolutely at each check, and
    once more after a short wait before a refusal.

    Safe to share between threads: a scheduler that starts several runners at once
    uses one gate, and ``reserve`` around each start. It does not know of runners
    that other processes are starting.

    Args:
        minimum_bytes: Kept free for what no model's size tells. By default 512 MiB
            on Metal and 457 MiB elsewhere.
        overhead_bytes: Kept free on top. By default what the environment variable
            ``MLX_RUNNER_GPU_OVERHEAD`` says, in bytes, or nothing.
        measure: Measures free memory; tests hand in a fake.
        settle_seconds: Wait before the second measurement.
        environ: Where the variable is looked up.

    Raises:
        InvalidRequestError: ``MLX_RUNNER_GPU_OVERHEAD`` is no number of bytes.
    """

    def __init__(
        self,
        *,
        minimum_bytes: int | None = None,
        overhead_bytes: int | None = None,
        measure: Callable[[], FreeMemory] = free_memory,
        settle_seconds: float = SETTLE_SECONDS,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self._minimum_bytes = minimum_bytes
        self._extra_bytes = _overhead(environ) if overhead_bytes is None else overhead_bytes
        self._measure = measure
        self._settle_seconds = settle_seconds
        self._lock = threading.Lock()
        self._reserved: dict[object, int] = {}

    def check(
        self, estimate: MemoryEstimate, *, require_full: bool = False, override: bool = False
    ) -> GateDecision:
        """Lets a model through, or refuses it. May wait a second before it refuses.

        Args:
            estimate: What the model needs.
            require_full: Refuse with ``LoadRequiresFullError``, by which a scheduler
                knows that it should try elsewhere.
            override: Go on although it does not fit; the decision says so.

        Raises:
            InsufficientMemoryError: It does not fit.
        """
        with self.reserve(estimate, require_full=require_full, override=override) as decision:
            return decision

    @contextmanager
    def reserve(
        self, estimate: MemoryEstimate, *, require_full: bool = False, override: bool = False
    ) -> Iterator[GateDecision]:
        """Like ``check``, and keeps the need set aside until the block ends.

        To be held while a runner is started and loads, so that another check of
        this gate does not count the same free memory. What the runner has taken
        already counts twice until the block ends: a check is never too generous.

        Raises:
            InsufficientMemoryError: It does not fit; the block does not run.
        """
        token = object()
        decision = self._decide(estimate, token, override=False)
        if not decision.fits:
            if not override:
                time.sleep(self._settle_seconds)
            decision = self._decide(estimate, token, override=override)
        if not decision.fits and not override:
            raise _refusal(estimate, decision, require_full=require_full)
        try:
            yield decision
        finally:
            with self._lock:
                del self._reserved[token]

    def _decide(self, estimate: MemoryEstimate, token: object, *, override: bool) -> GateDecision:
        """Measures, decides, and sets the need aside if the answer is yes."""
        with self._lock:
            decision = self._compare(estimate.total_bytes)
            if decision.fits or override:
                self._reserved[token] = decision.required_bytes
            return replace(decision, overridden=override and not decision.fits)

    def _compare(self, required_bytes: int) -> GateDecision:
        free = self._measure()
        reserved_bytes = sum(self._reserved.values())
        overhead_bytes = self._minimum(free) + self._extra_bytes
        available_bytes = max(0, free.available_bytes - overhead_bytes - reserved_bytes)
        return GateDecision(
            fits=required_bytes <= available_bytes,
            required_bytes=required_bytes,
            available_bytes=available_bytes,
            overhead_bytes=overhead_bytes,
            reserved_bytes=reserved_bytes,
            free=free,
        )

    def _minimum(self, free: FreeMemory) -> int:
        if self._minimum_bytes is not None:
            return self._minimum_bytes
        return METAL_MINIMUM_BYTES if free.device_kind == "metal" else MINIMUM_BYTES


def _overhead(environ: Mapping[str, str]) -> int:
    text = environ.get(OVERHEAD_VARIABLE, "").strip()
    if not text:
        return 0
    if not (text.isascii() and text.isdecimal()):
        raise InvalidRequestError(
            f"{OVERHEAD_VARIABLE} is {text!r}; it must be a number of bytes, for instance "
            "1073741824 for 1 GiB",
            field_violations=[(OVERHEAD_VARIABLE, "must be a whole number of bytes")],
        )
    return int(text)


def _refusal(
    estimate: MemoryEstimate, decision: GateDecision, *, require_full: bool
) -> InsufficientMemoryError:
    kind = LoadRequiresFullError if require_full else InsufficientMemoryError
    return kind(
        _refusal_text(estimate, decision),
        required_bytes=decision.required_bytes,
        available_bytes=decision.available_bytes,
        overhead_bytes=decision.overhead_bytes,
    )


_LIMITED_BY = {
    "system": "the system's memory",
    "cgroup": "the control group's limit",
    "device": "the device's limit",
}


def _refusal_text(estimate: MemoryEstimate, decision: GateDecision) -> str:
    part, part_bytes = max(estimate.parts.items(), key=lambda item: item[1])
    reserved = (
        f" and {format_bytes(decision.reserved_bytes)} for models still loading"
        if decision.reserved_bytes
        else ""
    )
    smaller_cache = "prefix_cache_bytes, " if estimate.prefix_cache_bytes else ""
    return (
        f"{estimate.model} requires {format_bytes(decision.required_bytes)}, most of it "
        f"{part} ({format_bytes(part_bytes)}), but only {format_bytes(decision.available_bytes)} "
        f"are available: {format_bytes(decision.free.available_bytes)} free by "
        f"{_LIMITED_BY[decision.free.source]} on {decision.free.device_name}, less "
        f"{format_bytes(decision.overhead_bytes)} overhead{reserved}. Stop another process, "
        f"lower {smaller_cache}context_length ({estimate.context_length}) or parallel "
        f"({estimate.parallel}), use a smaller model, or override the gate"
    )
