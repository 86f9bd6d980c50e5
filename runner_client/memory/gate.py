"""The memory gate: does a model fit, decided before a process is started for it."""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from runner_client.errors import (
    InsufficientMemoryError,
    InvalidRequestError,
    LoadRequiresFullError,
)
from runner_common.host_memory.free import FreeMemory, Host, free_memory
from runner_common.memory.headroom import (
    METAL_MINIMUM_BYTES,
    MINIMUM_BYTES,
    MINIMUM_VARIABLE,
    OVERHEAD_VARIABLE,
    Headroom,
    VariableError,
)
from runner_common.memory.reservations import (
    Decision,
    ReservationBook,
    claimed_of,
    decide,
    default_directory,
)
from runner_common.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from typing import Any

    from runner_client.memory.estimation import MemoryEstimate
    from runner_common.host_memory.free import Backend
    from runner_common.memory.reservations import BookView, Reservation

__all__ = [
    "METAL_MINIMUM_BYTES",
    "MINIMUM_BYTES",
    "MINIMUM_VARIABLE",
    "OVERHEAD_VARIABLE",
    "Admission",
    "GateDecision",
    "MemoryGate",
]

SETTLE_SECONDS = 1.0
"""Wait before the second measurement: a runner just stopped frees its memory late."""


@dataclass(frozen=True, slots=True)
class GateDecision(Decision):
    """One decision, with the numbers it rests on.

    Attributes:
        fits: Whether the need is at most what is available.
        required_bytes: The need.
        available_bytes: Free memory less overhead and reservations, never negative.
        overhead_bytes: Kept free: the device's minimum and the configured overhead.
        reserved_bytes: What other runners of this machine may still take.
        free: The measurement.
        reserved_count: How many runners that is, loads under way included.
        overridden: It does not fit and the caller goes on all the same.
    """

    reserved_count: int = 0
    overridden: bool = False


class Admission(GateDecision):
    """The decision on a model that was let through, with the memory set aside for it.

    Attributes:
        headroom: What is kept free, for the environment of the runner.
        reservation: What is set aside.
    """

    __slots__ = ("headroom", "reservation")
    headroom: Headroom
    reservation: Reservation

    @classmethod
    def of(cls, decision: GateDecision, headroom: Headroom, reservation: Reservation) -> Admission:
        """Join a decision with the memory that was set aside by it."""
        admission = cls(*_values(decision))
        object.__setattr__(admission, "headroom", headroom)
        object.__setattr__(admission, "reservation", reservation)
        return admission

    def assign(self, pid: int) -> None:
        """Hand the memory to the runner that was started: it stays set aside until that ends.

        Args:
            pid: The runner's process id.
        """
        self.reservation.assign(pid)


class MemoryGate:
    """Compares what a model needs with what is free and what other runners may still take.

    A model is let through if its need is at most the free memory of the first device, less
    an overhead, less what other runners of this machine may still come to take. Free memory
    is measured absolutely at each check, and once more after a short wait before a refusal.

    ``RunnerProcess`` asks a gate by itself and keeps the model's need set aside as long as
    its runner lives. ``reserve`` is for those who start runners by other means.

    Safe to share between threads. The gates of all processes of a user know of each other's
    reservations, and those of the superuser of all users'; a container with a ``/tmp`` or
    processes of its own has reservations of its own.

    Args:
        minimum_bytes: Kept free for what no model's size tells. By default what the
            environment variable ``MLX_RUNNER_MEMORY_MINIMUM`` says, in bytes, or 512 MiB on
            Metal and 457 MiB elsewhere.
        overhead_bytes: Kept free on top. By default what the environment variable
            ``MLX_RUNNER_GPU_OVERHEAD`` says, in bytes, or nothing.
        measure: Measures free memory; tests hand in a fake.
        settle_seconds: Wait before the second measurement.
        environ: Where the variables are looked up. ``RunnerProcess`` looks them up in the
            environment of its child.
        reservations: The reservations of this machine. By default those in the directory
            that ``MLX_RUNNER_RUNTIME_DIR`` names, or in one of this user's in ``/tmp``.

    Raises:
        InvalidRequestError: One of the variables is not a number of bytes.
    """

    def __init__(
        self,
        *,
        minimum_bytes: int | None = None,
        overhead_bytes: int | None = None,
        measure: Callable[[], FreeMemory] | None = None,
        settle_seconds: float = SETTLE_SECONDS,
        environ: Mapping[str, str] = os.environ,
        reservations: ReservationBook | None = None,
    ) -> None:
        self._minimum_bytes = minimum_bytes
        self._overhead_bytes = overhead_bytes
        self._measure = measure
        self._settle_seconds = settle_seconds
        self._environ = environ
        self._book = reservations
        self._headroom(environ, "cpu")

    def check(
        self, estimate: MemoryEstimate, *, require_full: bool = False, override: bool = False
    ) -> GateDecision:
        """Let a model through, or refuse it. May wait a second before it refuses.

        Args:
            estimate: What the model needs.
            require_full: Refuse with ``LoadRequiresFullError``, by which a scheduler
                knows that it should evict a runner, or try elsewhere.
            override: Go on although it does not fit; the decision says so.

        Raises:
            InsufficientMemoryError: It does not fit.
        """
        asked = _Asked(estimate, self._environ, override, sets_aside=False)
        decision = self._settled(asked)
        if decision.fits or override:
            return decision
        raise _refusal(estimate, decision, require_full=require_full)

    @contextmanager
    def reserve(
        self, estimate: MemoryEstimate, *, require_full: bool = False, override: bool = False
    ) -> Iterator[Admission]:
        """Like ``check``, and keep the need set aside while a runner is started in the block.

        For runners that ``RunnerProcess`` does not start::

            with gate.reserve(estimate(model)) as admission:
                process = subprocess.Popen(...)
                admission.assign(process.pid)

        What is assigned stays set aside until that process ends; the rest is given up at
        the end of the block. A ``RunnerProcess`` that is started in the block with the same
        need takes the reservation over instead of counting it a second time.

        Raises:
            InsufficientMemoryError: It does not fit; the block does not run.
        """
        asked = _Asked(estimate, self._environ, override)
        admission = self._admit(asked, require_full=require_full)
        reservation = admission.reservation
        self.book().offer(asked.offer_key, reservation)
        try:
            yield admission
        finally:
            if not reservation.is_assigned:
                reservation.release()

    def admit(
        self,
        estimate: MemoryEstimate,
        *,
        require_full: bool = False,
        override: bool = False,
        environ: Mapping[str, str] | None = None,
    ) -> Admission:
        """Like ``reserve`` without a block: the caller assigns or releases the reservation.

        Takes over what ``reserve`` has set aside in this process for the same need.

        Args:
            estimate: What the model needs.
            require_full: Refuse with ``LoadRequiresFullError``.
            override: Go on although it does not fit.
            environ: The environment of the runner, if it is not that of this gate.

        Raises:
            InsufficientMemoryError: It does not fit.
            InvalidRequestError: A variable is not a number of bytes.
        """
        environ = self._environ if environ is None else environ
        asked = _Asked(estimate, environ, override, takes_over=True)
        return self._admit(asked, require_full=require_full)

    def _admit(self, asked: _Asked, *, require_full: bool) -> Admission:
        decision = self._settled(asked)
        if isinstance(decision, Admission):
            return decision
        raise _refusal(asked.estimate, decision, require_full=require_full)

    def book(self, environ: Mapping[str, str] | None = None) -> ReservationBook:
        """Return the reservations that this gate counts.

        Args:
            environ: Where their directory is looked up, if this gate was not given any.
        """
        environ = self._environ if environ is None else environ
        return self._book or ReservationBook(default_directory(environ))

    def _settled(self, asked: _Asked) -> GateDecision:
        """Decide, and once more after a wait if the answer is no.

        Returns:
            An ``Admission`` if the need was to be set aside and the answer is yes.
        """
        decision = self._decide(replace(asked, override=False))
        if decision.fits:
            return decision
        if not asked.override:
            time.sleep(self._settle_seconds)
        return self._decide(asked)

    def _decide(self, asked: _Asked) -> GateDecision:
        """Measure and decide while no other process does."""
        book = self.book(asked.environ)
        with book.locked() as view:
            offered = book.offered(asked.offer_key) if asked.takes_over else None
            without = {offered.name} if offered else set()
            free = self._measure() if self._measure else free_memory(Host(environ=asked.environ))
            headroom = self._headroom(asked.environ, free.device_kind)
            claimed_bytes, count = claimed_of(free, view.claims(without=without))
            found = decide(asked.estimate.required_bytes, free, headroom, claimed_bytes)
            decision = _gate_decision(found, count, overridden=asked.override and not found.fits)
            if asked.sets_aside and (decision.fits or asked.override):
                reservation = _set_aside(asked, decision, view, offered)
                return Admission.of(decision, headroom, reservation)
            return decision

    def _headroom(self, environ: Mapping[str, str], device_kind: Backend) -> Headroom:
        """Return what is kept free: the numbers given, else those of the environment."""
        given = {
            MINIMUM_VARIABLE: self._minimum_bytes,
            OVERHEAD_VARIABLE: self._overhead_bytes,
        }
        known = {name: str(size) for name, size in given.items() if size is not None}
        try:
            return Headroom.from_environ({**environ, **known}, device_kind)
        except VariableError as error:
            raise InvalidRequestError(
                str(error), field_violations=[(error.variable, "must be a whole number of bytes")]
            ) from error


@dataclass(frozen=True, slots=True)
class _Asked:
    """A question to the gate."""

    estimate: MemoryEstimate
    environ: Mapping[str, str]
    override: bool
    sets_aside: bool = True
    takes_over: bool = False

    @property
    def offer_key(self) -> tuple[str, int]:
        """What a runner that is started in a ``reserve`` block has in common with it."""
        return self.estimate.path, self.estimate.total_bytes


def _set_aside(
    asked: _Asked, decision: GateDecision, view: BookView, offered: Reservation | None
) -> Reservation:
    """Reserve all of the need, and a default prefix cache as far as there is memory for it."""
    need = asked.estimate
    size = min(need.total_bytes, max(need.required_bytes, decision.available_bytes))
    if offered is None:
        return view.add(size, need.path, device=decision.free.device_id)
    return offered.take_over(size)


def _gate_decision(decision: Decision, count: int, *, overridden: bool) -> GateDecision:
    return GateDecision(
        fits=decision.fits,
        required_bytes=decision.required_bytes,
        available_bytes=decision.available_bytes,
        overhead_bytes=decision.overhead_bytes,
        reserved_bytes=decision.reserved_bytes,
        free=decision.free,
        reserved_count=count,
        overridden=overridden,
    )


def _values(decision: Decision) -> list[Any]:
    """Return the fields of a decision in their order."""
    return [getattr(decision, field.name) for field in fields(decision)]


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
    parts = dict(estimate.parts)
    counts_prefix_cache = estimate.required_bytes == estimate.total_bytes
    if not counts_prefix_cache:
        del parts["prefix cache"]
    part, part_bytes = max(parts.items(), key=lambda item: item[1])
    has_cache = counts_prefix_cache and estimate.prefix_cache_bytes
    smaller_cache = "prefix_cache_bytes, " if has_cache else ""
    return (
        f"{estimate.model} requires {format_bytes(decision.required_bytes)}, most of it "
        f"{part} ({format_bytes(part_bytes)}), but only {format_bytes(decision.available_bytes)} "
        f"are available: {format_bytes(decision.free.available_bytes)} free by "
        f"{_LIMITED_BY[decision.free.source]} on {decision.free.device_name}, less "
        f"{format_bytes(decision.overhead_bytes)} overhead{_reserved_text(decision)}. Stop another "
        f"{'runner or process' if decision.reserved_bytes else 'process'}, "
        f"lower {smaller_cache}context_length ({estimate.context_length}) or parallel "
        f"({estimate.parallel}), use a smaller model, or override the gate"
    )


def _reserved_text(decision: GateDecision) -> str:
    if not decision.reserved_bytes:
        return ""
    others = (
        "1 other runner"
        if decision.reserved_count == 1
        else (f"{decision.reserved_count} other runners")
    )
    return f" and {format_bytes(decision.reserved_bytes)} that {others} may still take"
