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
    """The socket's path is in use. The message says by what."""


@contextmanager
def socket_place(path: Path) -> Iterator[None]:
    """Clear a socket's path and keep other servers from binding it within the context.

    Removes a socket left by a killed server. gRPC itself would silently replace any socket, even a
    live server's.

    Raises:
        OccupiedError: A server listens there, the path is not a socket, or the socket is another
            user's or cannot be removed.
    """
    with _locked(path.parent):
        _clear(path)
        yield


def _clear(path: Path) -> None:
    # If the path cannot be examined, the error of binding is the better one.
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
    """Return True if no process listens on a socket.

    Raises:
        OccupiedError: This user may not connect to the socket.
    """
    with socket.socket(socket.AF_UNIX) as caller:
        # Non-blocking, because a server with a full backlog would block the attempt.
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
    """Lock a folder; after two seconds go on without the lock, which another program may hold."""
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
