"""Guard that ends the process after its parent, however the parent ends.

The first sign is the end of file on stdin, a pipe whose write end only the parent holds, so that
the kernel closes it in every case. The parent's process id is polled as well, because a fork of
the parent may keep the pipe open, and stdin may not be a pipe (/dev/null, in a service).
PR_SET_PDEATHSIG would not do, because it is tied to a thread and missing on macOS, nor would
``getppid() == 1``, which is wrong under subreapers and if the parent is process 1.
"""

from __future__ import annotations

import logging
import os
import stat
import sys
import threading
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.5
_GRACE_SECONDS = 0.7
"""Time for an orderly stop after the parent's end. With the polling interval before it, and the
time to free the process's memory after it, the total stays under the promised 2 s."""


class OrphanGuard:
    """Watches the parent process from daemon threads.

    Args:
        on_orphaned: Called once, on one of the threads, to begin an orderly stop. If the process
            still runs 0.7 s later, it exits with code 1.
    """

    def __init__(self, on_orphaned: Callable[[], object]) -> None:
        self._on_orphaned = on_orphaned
        self._parent = os.getppid()
        self._once = threading.Lock()

    def start(self) -> None:
        """Start watching."""
        signs = [self._watch_parent]
        if _is_pipe(_stdin()):
            signs.append(self._watch_stdin)
        for target in signs:
            threading.Thread(target=target, name=target.__name__, daemon=True).start()

    def _watch_stdin(self) -> None:
        try:
            while os.read(_stdin(), 4096):
                pass
        except OSError:
            logger.exception("stdin cannot be read; it should be a pipe held by the parent")
        self._end("the parent closed stdin or ended")

    def _watch_parent(self) -> None:
        while os.getppid() == self._parent:
            time.sleep(_POLL_SECONDS)
        self._end(f"the parent, process {self._parent}, ended")

    def _end(self, sign: str) -> None:
        if not self._once.acquire(blocking=False):
            return
        logger.info("stopping, because %s", sign)
        self._on_orphaned()
        time.sleep(_GRACE_SECONDS)
        os._exit(1)


def _stdin() -> int:
    return sys.__stdin__.fileno() if sys.__stdin__ else 0


def _is_pipe(descriptor: int) -> bool:
    """Return True if the end of file means something: for a pipe, a socket, or a closed stdin."""
    try:
        mode = os.fstat(descriptor).st_mode
    except OSError:
        return True
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)
