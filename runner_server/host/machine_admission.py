"""Whether this machine has the memory that a load needs, and what is set aside for it."""

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
    """Compares needs with the machine's free memory and with what other runners may take.

    By the same rules and the same reservations as the client's gate. Thread-safe.

    Args:
        book: The reservations of this machine.
        measure: Measures free memory.

    Raises:
        VariableError: ``MLX_RUNNER_GPU_OVERHEAD`` or ``MLX_RUNNER_MEMORY_MINIMUM`` is not a
            number of bytes.
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
        # A wrong value is to be told of at the start, not at the first load.
        Headroom.from_environ(os.environ, "cpu")

    def admit(self, model: str, need: MemoryNeed, *, override: bool) -> int:
        """See :meth:`Admission.admit`. A refusal leaves no reservation of this process."""
        with self._lock, self._book.locked() as book:
            # What a GPU held is back, whatever was reported last.
            decision = self._decide(book, need.required_bytes, held_bytes=0)
            book.drop_owned_by(os.getpid())
            self._reservation = None
            if not (decision.fits or override):
                raise _refusal(need, decision)
            granted = max(need.required_bytes, min(need.total_bytes, decision.available_bytes))
            device = decision.free.device_id
            self._reservation = book.add(granted, model, pid=os.getpid(), device=device)
        return granted

    def compare(self, required_bytes: int) -> Decision:
        """Compare a need with what a load could take now, and set nothing aside.

        A model that is loaded here would be unloaded first, so its memory counts as free.
        """
        with self._book.locked() as book:
            return self._decide(book, required_bytes, self._held_bytes)

    def spare_bytes(self) -> int:
        """Return what is free beyond all that is kept free and that others may take.

        Negative where memory is short.
        """
        with self._book.locked() as book:
            free = self._measure()
            claimed = book.claimed_bytes({os.getpid()}, free)
        headroom = Headroom.from_environ(os.environ, free.device_kind)
        return free.available_bytes - headroom.total_bytes - claimed

    def note_held(self, held_bytes: int) -> None:
        """Report what this process holds, where its resident set does not show it."""
        with self._lock:
            self._held_bytes = held_bytes
            if self._reservation:
                self._reservation.update(held_bytes=held_bytes)

    def release(self) -> None:
        """Give up what was set aside for this process."""
        with self._lock, self._book.locked() as book:
            book.drop_owned_by(os.getpid())
            self._reservation = None
            self._held_bytes = 0

    def _decide(self, book: BookView, required_bytes: int, held_bytes: int) -> Decision:
        """Compare; what this process holds already is a part of its need and counts as free."""
        free = _without_own(self._measure(), resident_bytes(), held_bytes)
        claimed = book.claimed_bytes({os.getpid()}, free)
        headroom = Headroom.from_environ(os.environ, free.device_kind)
        return decide(required_bytes, free, headroom, claimed)


def _without_own(free: FreeMemory, resident: int, held: int) -> FreeMemory:
    """Return what would be free if this process held nothing.

    Args:
        free: The measurement.
        resident: What this process holds of the system's memory.
        held: What it holds of a GPU's own. Metal's figure is the limit of the working set,
            whatever is held.
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


def _refusal(need: MemoryNeed, decision: Decision) -> InsufficientMemory:
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
