"""Memory reservations for the runners of this machine, shared by the processes of a user.

Each runner, and each load in progress, has a record of the most memory it may take in total. Free
memory already excludes the memory it has taken, so a record claims only the rest. The record of a
process that has ended claims nothing, and the next reader removes it.

Records are files in a directory that only their user can enter. The superuser counts the records
of all users; other users see only their own. Containers with a separate /tmp or process namespace
have separate records.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from runner_common.memory.claims import Claim, Decision, claimed_of, decide
from runner_common.memory.processes import resident_bytes
from runner_common.memory.record_store import DIRECTORY_VARIABLE, RecordStore, default_directory
from runner_common.memory.records import Record

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable, Iterator
    from pathlib import Path

    from runner_common.host_memory.free import FreeMemory

__all__ = [
    "DIRECTORY_VARIABLE",
    "BookView",
    "Claim",
    "Decision",
    "Reservation",
    "ReservationBook",
    "claimed_of",
    "decide",
    "default_directory",
]

_MODEL_CHARACTERS = 1024
_REWRITE_BYTES = 1024**2
_REWRITE_SECONDS = 3600.0
"""Age at which a record is rewritten, because cleaners of /tmp remove old files."""


class Reservation:
    """Memory reserved for one runner, until released or until the owning process ends.

    Get one from :meth:`BookView.add`. Thread-safe; no method waits for another process.
    """

    def __init__(self, store: RecordStore, name: str, record: Record) -> None:
        self._store = store
        self._name = name
        self._record = record
        self._lock = threading.Lock()
        self._written = time.monotonic()
        self._is_over = False
        self._maker = os.getpid()

    def __repr__(self) -> str:
        record = self._record
        return f"<Reservation {record.need_bytes} bytes for {record.model!r} of {record.pid}>"

    @property
    def name(self) -> str:
        """Name of the reservation in the book."""
        return self._name

    @property
    def need_bytes(self) -> int:
        """Most memory the runner may take in total."""
        return self._record.need_bytes

    @property
    def is_open(self) -> bool:
        """True if the reservation is still to be assigned to a runner by this process."""
        return not (self._is_over or self._record.is_assigned) and self._is_mine

    @property
    def is_assigned(self) -> bool:
        """True if the runner itself owns the reservation."""
        return self._record.is_assigned

    def assign(self, pid: int) -> None:
        """Assign the reservation to the runner's process, whose end then releases the memory."""
        with self._lock:
            self._replace(self._record.owned_by(pid, is_assigned=True))

    def update(self, *, need_bytes: int | None = None, held_bytes: int | None = None) -> None:
        """Change the need of the runner, or report the memory held.

        A small change of ``held_bytes`` alone is not written. Raise ``need_bytes`` only after a
        decision, while the book is locked.
        """
        with self._lock:
            old = self._record
            new = replace(
                old,
                need_bytes=old.need_bytes if need_bytes is None else need_bytes,
                held_bytes=old.held_bytes if held_bytes is None else held_bytes,
            )
            is_close = abs(new.held_bytes - old.held_bytes) < _REWRITE_BYTES
            is_recent = time.monotonic() - self._written < _REWRITE_SECONDS
            if new.need_bytes == old.need_bytes and is_close and is_recent:
                return
            self._replace(new)

    def _replace(self, record: Record) -> None:
        if not self._is_over and self._is_mine:
            self._record = record
            self._written = time.monotonic()
            self._store.write(self._name, record)

    def release(self) -> None:
        """End the reservation. No-op if already ended."""
        with self._lock:
            if not self._is_over and self._is_mine:
                self._store.remove(self._name)
            self._is_over = True

    @property
    def _is_mine(self) -> bool:
        """True in the process that created the object, False in a forked child."""
        return self._maker == os.getpid()

    def take_over(self, need_bytes: int) -> Reservation:
        """Replace this reservation by a new one for ``need_bytes``, and return the new one."""
        with self._lock:
            self._is_over = True
            record = replace(self._record, need_bytes=need_bytes)
        self._store.write(self._name, record)
        return Reservation(self._store, self._name, record)


class BookView:
    """The records at one moment, from :meth:`ReservationBook.locked`: no other process decides."""

    def __init__(self, store: RecordStore) -> None:
        self._store = store
        self._records = records = store.read()
        self._earlier = {
            record.pid: resident_bytes(record.pid)
            for record in records.values()
            if record.is_assigned and not record.device
        }

    def records(self) -> tuple[Record, ...]:
        """Return the records of all running processes."""
        return tuple(self._records.values())

    def claims(
        self, exclude: Collection[int] = (), without: Collection[str] = ()
    ) -> tuple[Claim, ...]:
        """Return the memory each process may still take, without claims of zero.

        Args:
            exclude: Process ids whose records are not counted.
            without: Names of reservations that are not counted.
        """
        owners: dict[tuple[int, str], list[Record]] = {}
        for name, record in self._records.items():
            if record.pid not in exclude and name not in without:
                owners.setdefault((record.pid, record.device), []).append(record)
        claims = (
            Claim(pid, self._claimed(records, device), device)
            for (pid, device), records in owners.items()
        )
        return tuple(claim for claim in claims if claim.claimed_bytes)

    def _claimed(self, records: list[Record], device: str) -> int:
        """Return the bytes still claimed by the records of one process and device."""
        promised = sum(record.need_bytes for record in records if not record.is_assigned)
        own = [record for record in records if record.is_assigned]
        need = sum(record.need_bytes for record in own)
        # The memory of a discrete GPU is not part of the resident set.
        resident = 0 if device or not own else self._resident(own[0].pid)
        return promised + max(0, need - max(resident, sum(record.held_bytes for record in own)))

    def _resident(self, pid: int) -> int:
        """Return the smaller resident set of those before and after free memory was measured.

        So the claim of a process that grows or shrinks in between is never underestimated.
        """
        now, earlier = resident_bytes(pid), self._earlier.get(pid)
        return now if earlier is None else min(now or earlier, earlier)

    def claimed_bytes(
        self,
        exclude: Collection[int] = (),
        free: FreeMemory | None = None,
        *,
        without: Collection[str] = (),
    ) -> int:
        """Return the memory other runners may still take.

        Args:
            exclude: Process ids whose records are not counted.
            free: A measurement; if given, only claims on the measured memory count, and not
                those on another GPU or in another control group.
            without: Names of reservations that are not counted.
        """
        claims = self.claims(exclude, without)
        if free is None:
            return sum(claim.claimed_bytes for claim in claims)
        return claimed_of(free, claims)[0]

    def add(
        self, need_bytes: int, model: str, pid: int | None = None, *, device: str = ""
    ) -> Reservation:
        """Reserve memory.

        Args:
            need_bytes: Most memory that the runner may take in total.
            model: Name of the model, for people.
            pid: The runner; None for a runner that this process is about to start.
            device: ``FreeMemory.device_id`` of the measurement used for the decision.
        """
        record = Record(need_bytes, model[:_MODEL_CHARACTERS], 0, 0.0, "", device=device)
        owner = os.getpid() if pid is None else pid
        record = record.owned_by(owner, is_assigned=pid is not None)
        name = secrets.token_hex(8)
        self._records[name] = record
        self._store.write(name, record)
        return Reservation(self._store, name, record)

    def drop_owned_by(self, pid: int) -> None:
        """Remove a runner's records, including those that other processes have assigned to it.

        Reservations of that process for runners it is about to start remain.
        """
        for name, record in list(self._records.items()):
            if record.pid == pid and record.is_assigned:
                del self._records[name]
                self._store.remove(name)


class _Shared:
    """State shared by the books of one directory in this process."""

    def __init__(self, directory: Path) -> None:
        self.store = RecordStore(directory)
        self.offers: list[tuple[Hashable, Reservation]] = []


_shared: dict[Path, _Shared] = {}


def _forget_threads() -> None:
    for shared in _shared.values():
        shared.store.forget_threads()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)


class ReservationBook:
    """Reservations of this machine. Safe across threads and processes.

    If the directory cannot be used, reservations are visible within this process only, and a
    warning says why.

    Args:
        directory: Directory of the records. Default: ``MLX_RUNNER_RUNTIME_DIR``, or a
            directory of this user in ``/tmp``.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = directory or default_directory()
        # Shared by the books of this directory; setdefault is atomic.
        self._shared = _shared.setdefault(self.directory, _Shared(self.directory))

    @contextmanager
    def locked(self) -> Iterator[BookView]:
        """Keep other threads and processes from deciding within the context.

        Waits for another decision for at most about 10 s, then continues and logs a warning. Not
        reentrant. Do nothing slower within the context than measuring and deciding.
        """
        with self._shared.store.locked():
            yield BookView(self._shared.store)

    def offer(self, key: Hashable, reservation: Reservation) -> None:
        """Offer a reservation to a runner started by this process."""
        self._shared.offers.append((key, reservation))

    def offered(self, key: Hashable) -> Reservation | None:
        """Return a reservation offered under a key and still open; None if there is none."""
        offers = self._shared.offers
        offers[:] = [offer for offer in offers if offer[1].is_open]
        return next((reservation for found, reservation in offers if found == key), None)
