"""Admission of loads by the machine's free memory, and this process's reservation."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from typing import TYPE_CHECKING

from runner_common.host_memory.free import FreeMemory, free_memory
from runner_common.memory.claims import Decision, decide
from runner_common.memory.headroom import Headroom
from runner_common.memory.reservations import Reservation, ReservationBook
from runner_common.units import format_bytes
from runner_server.errors import InsufficientMemory
from runner_server.host.resident_memory import resident_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from runner_common.memory.need import MemoryNeed
    from runner_common.memory.reservations import BookView


class MachineAdmission:
    """Compares needs with free memory, less the memory that other runners may still take.

    Implements ``Admission`` by the rules and reservations of the client's gate. Thread-safe.

    Args:
        book: The reservations of this machine. Default: those of this user.
        measure: Measures free memory.

    Raises:
        VariableError: ``MLX_RUNNER_GPU_OVERHEAD`` or ``MLX_RUNNER_MEMORY_MINIMUM`` is not a
            size.
    """

    def __init__(
        self,
        book: ReservationBook | None = None,
        measure: Callable[[], FreeMemory] = free_memory,
    ) -> None:
        self._book = book or ReservationBook()
        self._measure = measure
        self._lock = threading.Lock()
        self._reservation: Reservation | None = None
        self._held_bytes = 0
        # Report an invalid value at startup, not at the first load.
        Headroom.from_environ(os.environ, "cpu")

    def admit(self, model: str, need: MemoryNeed, *, override: bool) -> int:
        """Reserve memory for a load; see ``Admission.admit``.

        A refused load leaves this process without a reservation.
        """
        with self._lock, self._book.locked() as book:
            # 0, because the GPU memory of the previous model has been freed since the last report.
            decision = self._decide(book, need.required_bytes, held_bytes=0)
            book.drop_owned_by(os.getpid())
            self._reservation = None
            if not (decision.fits or override):
                raise refusal(need, decision)
            granted = max(need.required_bytes, min(need.total_bytes, decision.available_bytes))
            device = decision.free.device_id
            self._reservation = book.add(granted, model, pid=os.getpid(), device=device)
        return granted

    def compare(self, required_bytes: int) -> Decision:
        """Compare a need with the memory available to a load, without a reservation.

        The memory of a loaded model counts as free, because a load would replace that model.
        """
        with self._book.locked() as book:
            return self._decide(book, required_bytes, self._held_bytes)

    def spare_bytes(self) -> int:
        """Return the bytes free beyond headroom and other runners' claims; negative if short."""
        with self._book.locked() as book:
            free = self._measure()
            claimed = book.claimed_bytes({os.getpid()}, free)
        headroom = Headroom.from_environ(os.environ, free.device_kind)
        return free.available_bytes - headroom.total_bytes - claimed

    def note_held(self, held_bytes: int) -> None:
        """Record the memory that this process holds outside its resident set."""
        with self._lock:
            self._held_bytes = held_bytes
            if self._reservation:
                self._reservation.update(held_bytes=held_bytes)

    def release(self) -> None:
        """Release the reservation of this process."""
        with self._lock, self._book.locked() as book:
            book.drop_owned_by(os.getpid())
            self._reservation = None
            self._held_bytes = 0

    def _decide(self, book: BookView, required_bytes: int, held_bytes: int) -> Decision:
        """Compare a need with free memory as if this process held none."""
        free = _without_own(self._measure(), resident_bytes(), held_bytes)
        claimed = book.claimed_bytes({os.getpid()}, free)
        headroom = Headroom.from_environ(os.environ, free.device_kind)
        return decide(required_bytes, free, headroom, claimed)


def _without_own(free: FreeMemory, resident: int, held: int) -> FreeMemory:
    """Return the free memory as if this process held none.

    Args:
        free: The measurement.
        resident: Bytes of system memory held by this process.
        held: Bytes of a discrete GPU's memory held by this process. Not counted on Metal, where
            the measurement is the limit of the working set, whatever is in use.
    """

    def without(available: int | None, own: int) -> int | None:
        return None if available is None else available + own

    free = replace(
        free,
        system_bytes=free.system_bytes + resident,
        cgroup_bytes=without(free.cgroup_bytes, resident),
        groups=tuple(
            replace(group, available_bytes=group.available_bytes + resident)
            for group in free.groups
        ),
        device_bytes=without(free.device_bytes, held if free.device_id else 0),
    )
    return replace(free, available_bytes=min(limit.available_bytes for limit in free.limits))


def refusal(need: MemoryNeed, decision: Decision) -> InsufficientMemory:
    """Return the fault of a load that does not fit, with its numbers."""
    part, part_bytes = max(need.parts.items(), key=lambda item: item[1])
    return InsufficientMemory(
        f"the model needs {format_bytes(need.required_bytes)}, most of it {part} "
        f"({format_bytes(part_bytes)}), and {format_bytes(decision.available_bytes)} are "
        f"available: {format_bytes(decision.free.available_bytes)} free, less "
        f"{format_bytes(decision.overhead_bytes)} kept free and "
        f"{format_bytes(decision.reserved_bytes)} that other runners may still take; stop "
        "another runner, or load with a smaller context_length, parallel, dtype or "
        "prefix_cache_bytes",
        requiredBytes=need.required_bytes,
        availableBytes=decision.available_bytes,
    )
