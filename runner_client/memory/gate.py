"""Memory gate: the decision whether a model fits, made before a process starts."""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from runner_client.checks import check_integer, check_number
from runner_client.errors import (
    InsufficientMemoryError,
    InvalidRequestError,
    LoadRequiresFullError,
)
from runner_client.memory.refusal import refusal_text
from runner_common.contract import MAX_BYTES
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

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping
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
"""Wait before the second measurement, because a stopped runner frees its memory with a delay."""


@dataclass(frozen=True, slots=True)
class GateDecision(Decision):
    """A decision of the gate and the underlying numbers.

    Attributes:
        fits: Whether the need is at most the available memory.
        required_bytes: The model's need.
        available_bytes: Free memory less overhead and reservations, never negative.
        overhead_bytes: Memory kept free: the device's minimum plus the configured overhead.
        reserved_bytes: Memory that other runners on this machine may still use.
        free: The measurement of free memory.
        reserved_count: The number of other runners counted, including loads in progress.
        overridden: Whether the model does not fit and the caller overrode the gate.
    """

    reserved_count: int = 0
    overridden: bool = False


class Admission(GateDecision):
    """A decision to admit a model, with the memory reserved for the model.

    Attributes:
        headroom: Memory kept free, to be passed on in the runner's environment.
        reservation: The reserved memory.
    """

    __slots__ = ("headroom", "reservation")
    headroom: Headroom
    reservation: Reservation

    @classmethod
    def of(cls, decision: GateDecision, headroom: Headroom, reservation: Reservation) -> Admission:
        """Combine a decision with a reservation."""
        admission = cls(*_values(decision))
        object.__setattr__(admission, "headroom", headroom)
        object.__setattr__(admission, "reservation", reservation)
        return admission

    def assign(self, pid: int) -> None:
        """Hand the reservation over to a started runner, until the runner exits.

        Args:
            pid: The runner's process id.
        """
        self.reservation.assign(pid)


class MemoryGate:
    """Admission control for models: compares the need with the available memory.

    A model is admitted if its need is at most the free memory of the first device, less an
    overhead, less the memory that other runners on this machine may still use. Free memory is
    measured anew at each check, and again after a short wait before a refusal.

    ``RunnerProcess`` consults a gate on its own and keeps the model's need reserved for the
    lifetime of the runner. Use ``reserve`` if you start runners by other means.

    Thread-safe. All processes of a user share their reservations, and the superuser sees those of
    all users. A container with its own ``/tmp`` or its own processes has separate reservations.

    Args:
        minimum_bytes: Memory kept free for needs that no model's size predicts. Default: the
            environment variable ``MLX_RUNNER_MEMORY_MINIMUM``, or 512 MiB on Metal and
            457 MiB on other devices.
        overhead_bytes: Additional memory kept free. Default: the environment variable
            ``MLX_RUNNER_GPU_OVERHEAD``, or 0.
        measure: Function that measures free memory, replaceable in tests.
        settle_seconds: How long to wait before the second measurement.
        environ: The environment to read the variables from. ``RunnerProcess`` passes that of its
            child.
        reservations: The reservations of this machine. Default: those in the directory
            ``MLX_RUNNER_RUNTIME_DIR``, or in a directory of this user in ``/tmp``.

    Raises:
        TypeError: An argument is not a number.
        InvalidRequestError: An argument is negative, or a variable is not a size, such as
            ``8GiB``.
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
        check_integer("minimum_bytes", minimum_bytes, 0, MAX_BYTES)
        check_integer("overhead_bytes", overhead_bytes, 0, MAX_BYTES)
        check_number("settle_seconds", settle_seconds)
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
        """Decide whether a model fits, without reserving memory. Refusing takes ``settle_seconds``.

        Args:
            estimate: The memory that the model needs.
            require_full: Refuse with ``LoadRequiresFullError``, which tells a scheduler to evict a
                runner or to use another device.
            override: Return a decision even if the model does not fit; ``overridden`` is then True.

        Raises:
            InsufficientMemoryError: The model does not fit into memory.
        """
        asked = _Asked(estimate, self._environ, override, reserves=False)
        decision = self._settled(asked)
        if decision.fits or override:
            return decision
        headroom = self._headroom(self._environ, decision.free.device_kind)
        raise _refusal(estimate, decision, headroom, require_full=require_full)

    @contextmanager
    def reserve(
        self, estimate: MemoryEstimate, *, require_full: bool = False, override: bool = False
    ) -> Iterator[Admission]:
        """Admit a model and keep memory reserved while the block starts a runner.

        For runners not started by ``RunnerProcess``::

            with gate.reserve(estimate(model)) as admission:
                process = subprocess.Popen(...)
                admission.assign(process.pid)

        An assigned reservation lasts until that process exits; an unassigned one is released at the
        end of the block. A ``RunnerProcess`` started in the block with the same need takes the
        reservation over, so that it is not counted twice. The arguments are those of ``check``.

        Raises:
            InsufficientMemoryError: The model does not fit; the block does not run.
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
        running: Reservation | None = None,
    ) -> Admission:
        """Admit a model; the caller must assign or release the reservation.

        Takes over a reservation made by ``reserve`` in this process for the same need.

        Args:
            estimate: The memory that the model needs.
            require_full: Refuse with ``LoadRequiresFullError``.
            override: Admit the model even if it does not fit.
            environ: The runner's environment, if different from this gate's.
            running: The reservation of the runner that will load the model, if it runs already
                without one. It is a part of the need, and is raised to the whole need.

        Raises:
            InsufficientMemoryError: The model does not fit into memory.
            InvalidRequestError: A variable is not a size.
        """
        environ = self._environ if environ is None else environ
        asked = _Asked(estimate, environ, override, takes_over=running is None, running=running)
        return self._admit(asked, require_full=require_full)

    def _admit(self, asked: _Asked, *, require_full: bool) -> Admission:
        decision = self._settled(asked)
        if isinstance(decision, Admission):
            return decision
        headroom = self._headroom(asked.environ, decision.free.device_kind)
        raise _refusal(asked.estimate, decision, headroom, require_full=require_full)

    def available(self, environ: Mapping[str, str] | None = None) -> GateDecision:
        """Measure what another runner could take now, in ``available_bytes``.

        Args:
            environ: The runner's environment, if different from this gate's.

        Raises:
            InvalidRequestError: A variable is not a size.
        """
        environ = self._environ if environ is None else environ
        with self.book(environ).locked() as view:
            return self._compare(0, view, environ)[0]

    def book(self, environ: Mapping[str, str] | None = None) -> ReservationBook:
        """Return the reservations counted by this gate.

        Args:
            environ: The environment that names their directory, if this gate was created without
                ``reservations``.
        """
        environ = self._environ if environ is None else environ
        return self._book or ReservationBook(default_directory(environ))

    def _settled(self, asked: _Asked) -> GateDecision:
        """Decide, and decide again after a wait if the model does not fit.

        Returns:
            An ``Admission`` if a reservation was requested and the model is admitted.
        """
        decision = self._decide(replace(asked, override=False))
        if decision.fits:
            return decision
        if not asked.override:
            time.sleep(self._settle_seconds)
        return self._decide(asked)

    def _decide(self, asked: _Asked) -> GateDecision:
        """Measure and decide under the lock shared with other processes."""
        book = self.book(asked.environ)
        with book.locked() as view:
            offered = book.offered(asked.offer_key) if asked.takes_over else None
            # What the runner has reserved already is part of the need, and not available to others.
            need, own = asked.estimate.required_bytes, asked.running_bytes
            without = {offered.name} if offered else set()
            decision, headroom = self._compare(need - own, view, asked.environ, without)
            available_bytes = decision.available_bytes + own
            decision = replace(decision, required_bytes=need, available_bytes=available_bytes)
            if asked.reserves and (decision.fits or asked.override):
                decision = replace(decision, overridden=not decision.fits)
                reservation = _reserve(asked, decision, view, offered)
                return Admission.of(decision, headroom, reservation)
            return replace(decision, overridden=asked.override and not decision.fits)

    def _compare(
        self,
        required_bytes: int,
        view: BookView,
        environ: Mapping[str, str],
        without: Collection[str] = (),
    ) -> tuple[GateDecision, Headroom]:
        """Measure, and compare a need with what other runners leave."""
        free = self._measure() if self._measure else free_memory(Host(environ=environ))
        headroom = self._headroom(environ, free.device_kind)
        claimed_bytes, count = claimed_of(free, view.claims(without=without))
        found = decide(required_bytes, free, headroom, claimed_bytes)
        return _gate_decision(found, count), headroom

    def _headroom(self, environ: Mapping[str, str], device_kind: Backend) -> Headroom:
        """Return the memory to keep free, as given to this gate or set in the environment."""
        given = {
            MINIMUM_VARIABLE: self._minimum_bytes,
            OVERHEAD_VARIABLE: self._overhead_bytes,
        }
        known = {name: str(size) for name, size in given.items() if size is not None}
        try:
            return Headroom.from_environ({**environ, **known}, device_kind)
        except VariableError as error:
            raise InvalidRequestError(
                str(error), field_violations=[(error.variable, "must be a size")]
            ) from error


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request to the gate.

    Attributes:
        estimate: The memory that the model needs.
        environ: The runner's environment.
        override: Whether to admit a model that does not fit.
        reserves: Whether to reserve memory on admission.
        takes_over: Whether to use a reservation offered by a ``reserve`` block.
        running: The reservation of the runner that will load the model; None for a new runner.
    """

    estimate: MemoryEstimate
    environ: Mapping[str, str]
    override: bool
    reserves: bool = True
    takes_over: bool = False
    running: Reservation | None = None

    @property
    def running_bytes(self) -> int:
        """Memory that the runner has reserved already."""
        return self.running.need_bytes if self.running else 0

    @property
    def offer_key(self) -> tuple[str, int]:
        """Identity shared by a ``reserve`` block and a runner started in the block."""
        return self.estimate.path, self.estimate.total_bytes


def _reserve(
    asked: _Asked, decision: GateDecision, view: BookView, offered: Reservation | None
) -> Reservation:
    """Reserve the need, and as much of a default prefix cache as memory allows."""
    need = asked.estimate
    size = min(need.total_bytes, max(need.required_bytes, decision.available_bytes))
    if asked.running is not None:
        asked.running.update(need_bytes=size)
        return asked.running
    if offered is None:
        return view.add(size, need.path, device=decision.free.device_id)
    return offered.take_over(size)


def _gate_decision(decision: Decision, count: int) -> GateDecision:
    return GateDecision(
        fits=decision.fits,
        required_bytes=decision.required_bytes,
        available_bytes=decision.available_bytes,
        overhead_bytes=decision.overhead_bytes,
        reserved_bytes=decision.reserved_bytes,
        free=decision.free,
        reserved_count=count,
    )


def _values(decision: Decision) -> list[Any]:
    """Return the values of a decision's fields, in order."""
    return [getattr(decision, field.name) for field in fields(decision)]


def _refusal(
    estimate: MemoryEstimate, decision: GateDecision, headroom: Headroom, *, require_full: bool
) -> InsufficientMemoryError:
    kind = LoadRequiresFullError if require_full else InsufficientMemoryError
    return kind(
        refusal_text(estimate, decision, headroom),
        required_bytes=decision.required_bytes,
        available_bytes=decision.available_bytes,
        overhead_bytes=decision.overhead_bytes,
    )
