"""Store of all processes' reservation records, with the lock that serializes decisions."""

from __future__ import annotations

import logging
import os
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from runner_common.memory.processes import machine_scope, owner_uid
from runner_common.memory.records import (
    LOCK_NAME,
    FolderError,
    Record,
    RecordFolder,
    open_folder,
    try_lock,
    unlock,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

logger = logging.getLogger(__name__)

DIRECTORY_VARIABLE = "MLX_RUNNER_RUNTIME_DIR"
"""Environment variable with the directory of the records; the default is below ``SHARED``."""

SHARED = Path("/tmp")  # noqa: S108 - all processes of a machine must agree on it
"""Parent of the users' directories. Not TMPDIR, which differs between a user's sessions."""

LOCK_SECONDS = 10.0
"""Longest wait for another process's decision. Measuring a GPU may take 5 s, but a process that was
stopped while deciding would block the others indefinitely."""

_LOCK_RETRY_SECONDS = 0.002
_NAME = "mlx-runner-"


def default_directory(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the directory of this user's records."""
    given = environ.get(DIRECTORY_VARIABLE)
    return Path(given).absolute() if given else SHARED / f"{_NAME}{_uid()}"


def _uid() -> int:
    return os.geteuid() if hasattr(os, "geteuid") else 0


class RecordStore:
    """The records of one directory. Safe across threads and processes.

    If the directory cannot be written, records are visible within this process only, and the
    reason is logged once.

    Args:
        directory: Created if missing.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._thread_lock = threading.Lock()
        self._unwritten: dict[str, Record] = {}
        self._warned: set[str] = set()

    def write(self, name: str, record: Record) -> None:
        """Write a record for all processes, or on failure for this process only."""
        try:
            with open_folder(self.directory) as folder:
                folder.write(name, record)
        except (FolderError, OSError) as error:
            self._warn_unshared(error)
            self._unwritten[name] = record
        else:
            self._unwritten.pop(name, None)

    def remove(self, name: str) -> None:
        """Remove a record. No-op if there is none."""
        self._unwritten.pop(name, None)
        with suppress(FolderError, OSError), open_folder(self.directory) as folder:
            folder.remove(name)

    def read(self) -> dict[str, Record]:
        """Return the records of running processes by name, and remove those of dead ones."""
        records: dict[str, Record] = {}
        try:
            with open_folder(self.directory) as folder:
                records |= _living(folder)
                folder.sweep()
        except (FolderError, OSError) as error:
            self._warn_unshared(error)
        for path, uid in self._other_users():
            with suppress(FolderError, OSError), open_folder(path, uid) as folder:
                records |= _others(folder)
        unwritten = dict(self._unwritten)
        return records | {name: record for name, record in unwritten.items() if _runs(record)}

    def _other_users(self) -> Iterator[tuple[Path, int]]:
        """Yield the directories of other users, for the superuser only."""
        if _uid() != 0 or self.directory != SHARED / f"{_NAME}0":
            return
        with suppress(OSError):
            for path in SHARED.glob(f"{_NAME}*"):
                uid = path.name.removeprefix(_NAME)
                if uid.isdecimal() and uid != "0":
                    yield path, int(uid)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other threads and processes from deciding within the context.

        Waits for another decision for at most about ``LOCK_SECONDS``, then continues without the
        lock and logs a warning.
        """
        is_mine = self._thread_lock.acquire(timeout=LOCK_SECONDS)
        if not is_mine:
            logger.warning("another thread has been deciding on memory for %g s", LOCK_SECONDS)
        try:
            with self._file_lock():
                yield
        finally:
            if is_mine:
                self._thread_lock.release()

    @contextmanager
    def _file_lock(self) -> Iterator[None]:
        try:
            with open_folder(self.directory) as folder:
                descriptor = folder.open_lock()
        except (FolderError, OSError) as error:
            self._warn_unshared(error)
            yield
            return
        try:
            self._wait(descriptor)
            yield
        finally:
            unlock(descriptor)

    def _wait(self, descriptor: int) -> None:
        deadline = time.monotonic() + LOCK_SECONDS
        try:
            while not try_lock(descriptor):
                if time.monotonic() > deadline:
                    logger.warning(
                        "%s has been locked for %g s, by a process that is stopped or hangs; "
                        "going on without the lock, so two loads may be promised the same memory",
                        self.directory / LOCK_NAME,
                        LOCK_SECONDS,
                    )
                    return
                time.sleep(_LOCK_RETRY_SECONDS)
        except OSError as error:  # a file system without locks
            self._warn_unshared(error)

    def forget_threads(self) -> None:
        """Replace the thread lock in a forked child, where its holder does not exist."""
        self._thread_lock = threading.Lock()

    def _warn_unshared(self, error: Exception) -> None:
        text = str(error)
        if text not in self._warned:
            self._warned.add(text)
            logger.warning("memory reservations are visible within this process only: %s", text)


def _living(folder: RecordFolder) -> dict[str, Record]:
    """Return the records of running processes, and remove those of dead ones."""
    records = folder.read()
    for name, record in records.items():
        if record.scope == machine_scope() and not record.owner.is_alive:
            folder.remove(name)
    return {name: record for name, record in records.items() if _runs(record)}


def _others(folder: RecordFolder) -> dict[str, Record]:
    """Return another user's records about the same user's processes."""
    return {
        f"{folder.uid}/{name}": record
        for name, record in folder.read().items()
        if _runs(record) and owner_uid(record.pid) == folder.uid
    }


def _runs(record: Record) -> bool:
    return record.scope == machine_scope() and record.owner.is_alive
