"""Reservation records, as files in a private directory that a user's processes share."""

from __future__ import annotations

import json
import os
import stat
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from runner_common.memory.processes import ProcessIdentity, machine_scope

if sys.platform != "win32":
    import fcntl

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

VERSION = 1
LOCK_NAME = "lock"
_SUFFIX = ".json"
_TEMPORARY = ".new"
_DIRECTORY_MODE = 0o700
_MAX_FILE_BYTES = 16 * 1024
_MAX_FILES = 4096
_MAX_BYTES = 1 << 60
_LEFT_OVER_SECONDS = 60.0
"""Age from which a temporary file must be left over from an interrupted write."""


class FolderError(Exception):
    """A directory cannot be used for reservations. The message says why."""


@dataclass(frozen=True, slots=True)
class Record:
    """Memory reserved for one runner.

    Attributes:
        need_bytes: Most memory that the runner may take in total.
        model: Name of the model, for people.
        pid: Owner of the record: the runner, or the process about to start the runner.
        started: Start time of the owner, as ``ProcessIdentity.started``.
        scope: Machine and container in which ``pid`` is valid, as ``machine_scope``.
        is_assigned: Whether the owner is the runner itself, so that the memory that it holds is
            part of ``need_bytes``.
        held_bytes: Memory last reported as held by the runner.
        device: Id of the discrete GPU with the memory; empty for the system's memory.
    """

    need_bytes: int
    model: str
    pid: int
    started: float
    scope: str
    is_assigned: bool = False
    held_bytes: int = 0
    device: str = ""

    @property
    def owner(self) -> ProcessIdentity:
        """The owning process."""
        return ProcessIdentity(self.pid, self.started)

    def owned_by(self, pid: int, *, is_assigned: bool) -> Record:
        """Return the record with another process of this machine as owner."""
        owner = ProcessIdentity.of(pid)
        return replace(
            self,
            pid=pid,
            started=owner.started,
            scope=machine_scope(),
            is_assigned=is_assigned,
        )


def encode(record: Record) -> bytes:
    """Serialize a record."""
    return json.dumps({"version": VERSION, **asdict(record)}).encode()


def decode(data: bytes) -> Record | None:
    """Parse a record; return None for anything not written by this version."""
    try:
        values = json.loads(data)
        if not isinstance(values, dict) or values.pop("version", None) != VERSION:
            return None
        record = Record(**values)
    except (ValueError, TypeError, RecursionError):
        return None
    return record if _is_sound(record) else None


def _is_sound(record: Record) -> bool:
    counts: tuple[Any, ...] = (record.need_bytes, record.held_bytes)
    texts: tuple[Any, ...] = (record.model, record.scope, record.device)
    return (
        all(type(count) is int and 0 <= count <= _MAX_BYTES for count in counts)
        and all(type(text) is str for text in texts)
        and type(record.pid) is int
        and 0 < record.pid < 1 << 31
        and type(record.started) in (int, float)
        and type(record.is_assigned) is bool
    )


class RecordFolder:
    """An open directory of records; use :func:`open_folder` to get one. Safe across processes.

    Args:
        descriptor: File descriptor of the directory.
        uid: Owner of the directory.
    """

    def __init__(self, descriptor: int, uid: int) -> None:
        self._descriptor = descriptor
        self.uid = uid

    def read(self) -> dict[str, Record]:
        """Read the records by name, ignoring damaged and foreign files."""
        with os.scandir(self._descriptor) as entries:
            names = [entry.name for entry in islice(entries, _MAX_FILES)]
        found = ((name, self._read(name)) for name in names if name.endswith(_SUFFIX))
        return {name.removesuffix(_SUFFIX): record for name, record in found if record}

    def _read(self, name: str) -> Record | None:
        # O_NONBLOCK, because opening a pipe would block.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            descriptor = os.open(name, flags, dir_fd=self._descriptor)
        except OSError:
            return None
        try:
            about = os.fstat(descriptor)
            if not stat.S_ISREG(about.st_mode) or about.st_uid not in (self.uid, 0):
                return None
            data = os.read(descriptor, _MAX_FILE_BYTES + 1)
        except OSError:
            return None
        finally:
            os.close(descriptor)
        return decode(data) if len(data) <= _MAX_FILE_BYTES else None

    def write(self, name: str, record: Record) -> None:
        """Write a record, replacing an older one atomically.

        Raises:
            OSError: The record cannot be written.
        """
        temporary = name + _TEMPORARY
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(temporary, flags, 0o600, dir_fd=self._descriptor)
        with os.fdopen(descriptor, "wb") as file:
            file.write(encode(record))
        os.rename(
            temporary, name + _SUFFIX, src_dir_fd=self._descriptor, dst_dir_fd=self._descriptor
        )

    def remove(self, name: str) -> None:
        """Remove a record if possible."""
        with suppress(OSError):
            os.unlink(name + _SUFFIX, dir_fd=self._descriptor)

    def sweep(self) -> None:
        """Remove the temporary files of interrupted writes."""
        oldest = time.time() - _LEFT_OVER_SECONDS
        with os.scandir(self._descriptor) as entries:
            for entry in islice(entries, _MAX_FILES):
                if entry.name.endswith(_TEMPORARY):
                    with suppress(OSError):
                        if entry.stat(follow_symlinks=False).st_mtime < oldest:
                            os.unlink(entry.name, dir_fd=self._descriptor)

    def open_lock(self) -> int:
        """Open the file whose lock serializes decisions.

        Raises:
            OSError: The file cannot be opened.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(LOCK_NAME, flags, 0o600, dir_fd=self._descriptor)


@contextmanager
def open_folder(path: Path, uid: int | None = None) -> Iterator[RecordFolder]:
    """Open a directory of records.

    Args:
        path: The directory; created if missing and owned by this user.
        uid: User who must own the directory. Default: this user.

    Raises:
        FolderError: The directory cannot be opened, or other users could have written to it.
    """
    if sys.platform == "win32":
        raise FolderError("this system has no file locks that reservations could use")
    own = os.geteuid()
    if uid is None or uid == own:
        _make(path)
    descriptor = _open_directory(path)
    try:
        _check(path, os.fstat(descriptor), own if uid is None else uid)
        yield RecordFolder(descriptor, own if uid is None else uid)
    finally:
        os.close(descriptor)


def _make(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=_DIRECTORY_MODE)
        # The umask may have cleared more bits.
        path.chmod(_DIRECTORY_MODE)
    except FileExistsError:
        return
    except OSError as error:
        raise FolderError(f"cannot create {path}: {error.strerror or error}") from error


def _open_directory(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise FolderError(
            f"cannot open {path} as a directory: {error.strerror or error}"
        ) from error


def _check(path: Path, about: os.stat_result, uid: int) -> None:
    if about.st_uid != uid:
        raise FolderError(f"{path} belongs to user {about.st_uid}, not to user {uid}")
    mode = stat.S_IMODE(about.st_mode) & 0o777
    if mode != _DIRECTORY_MODE:
        raise FolderError(f"{path} has mode {mode:04o}; it must be {_DIRECTORY_MODE:04o}")


def try_lock(descriptor: int) -> bool:
    """Lock an open lock file unless another process holds the lock."""
    if sys.platform == "win32":
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def unlock(descriptor: int) -> None:
    """Unlock and close a lock file, even if a forked process has a copy of the descriptor."""
    if sys.platform != "win32":
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)
