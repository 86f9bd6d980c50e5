"""Files of unix sockets: detection of live servers and removal of stale files."""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_LOCK_SECONDS = 2.0
_LOCK_RETRY_SECONDS = 0.01


class OccupiedError(Exception):
    """The socket's path is taken; the message says by what."""


@contextmanager
def socket_place(path: Path) -> Iterator[None]:
    """Keep other servers from binding a socket's path while this one does.

    A socket left by a killed server is removed. gRPC would silently replace any socket, even
    that of a live server.

    Raises:
        OccupiedError: A server answers there, or the path is not a socket.
    """
    with _locked(path.parent):
        _clear(path)
        yield


def _clear(path: Path) -> None:
    # If the path cannot be examined, binding gives the better error.
    with suppress(OSError):
        mode = path.stat().st_mode
        if not stat.S_ISSOCK(mode):
            kind = "a directory" if stat.S_ISDIR(mode) else "a file"
            raise OccupiedError(f"{path} exists already and is {kind}; choose another path")
        if not _is_dead(path):
            raise OccupiedError(
                f"{path} exists already and is a socket in use; end the process that listens on "
                "it, or choose another path"
            )
        try:
            path.unlink()
        except OSError as error:
            raise OccupiedError(
                f"{path} is a socket that no process listens on, and cannot be removed: {error}"
            ) from error


def _is_dead(path: Path) -> bool:
    """Return whether no process listens on a socket."""
    with socket.socket(socket.AF_UNIX) as caller:
        # A server with a full backlog would block the connection attempt.
        caller.settimeout(0)
        try:
            caller.connect(str(path))
        except ConnectionRefusedError:
            return True
        except PermissionError as error:
            raise OccupiedError(f"{path} exists already and is another user's socket") from error
        except OSError:
            return False
    return False


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a lock on a folder, if the file system supports locks."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        yield
        return
    try:
        _lock(descriptor)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> None:
    """Lock a folder, or continue without after a while: other programs may hold the lock."""
    deadline = time.monotonic() + _LOCK_SECONDS
    while time.monotonic() < deadline:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_LOCK_RETRY_SECONDS)
        except OSError:
            return
        else:
            return
