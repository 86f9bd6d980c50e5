"""The file of a unix socket: whose it is, and when it may be replaced."""

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
    """Something is where the socket is to be; the message says what."""


@contextmanager
def socket_place(path: Path) -> Iterator[None]:
    """Keep other servers from the place of a socket while this one binds it.

    Removes a socket that a killed server has left: gRPC would replace any, a live server's
    too, without a word.

    Raises:
        OccupiedError: A server answers there, or it is no socket.
    """
    with _locked(path.parent):
        _clear(path)
        yield


def _clear(path: Path) -> None:
    # A path that cannot be looked at: binding tells more.
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
                f"{path} is a socket that nobody listens on, and cannot be removed: {error}"
            ) from error


def _is_dead(path: Path) -> bool:
    """Return whether nobody listens on a socket."""
    with socket.socket(socket.AF_UNIX) as caller:
        # A server whose queue of connections is full would keep it waiting.
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
    """Hold a lock on a folder, where its file system has locks."""
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
    """Lock a folder, or go on without after a while: it may be locked for another reason."""
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
