"""Identity and memory of other processes, from /proc where there is one, else by psutil."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil

_IS_LINUX = sys.platform == "linux"
_PROC = Path("/proc")
_ENDED = frozenset("ZXx")
_STATE_FIELD, _START_FIELD = 0, 19
"""Fields 3 and 22 of /proc/PID/stat, counted after the command's name."""

_CREATE_TOLERANCE_SECONDS = 2.0
"""Between two readings of a start time that the system computes from the clock."""


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """A process that its id alone does not tell from a later one with the same id.

    Attributes:
        pid: Its process id.
        started: When it started: ticks since the boot on Linux, seconds since 1970
            elsewhere; 0 where that cannot be told.
    """

    pid: int
    started: float

    @classmethod
    def of(cls, pid: int) -> ProcessIdentity:
        """Return the identity of a process id's present owner."""
        return cls(pid, _started(pid) or 0.0)

    @property
    def is_alive(self) -> bool:
        """Whether this process runs; a zombie does not."""
        started = _started(self.pid)
        if started is None:
            # Without a readable /proc only the id is left to go by.
            return self.started == 0 and not _proc_is_there() and _takes_signals(self.pid)
        if _IS_LINUX:
            return started == self.started
        return abs(started - self.started) <= _CREATE_TOLERANCE_SECONDS


def resident_bytes(pid: int) -> int:
    """Return the resident set of a process; 0 where it cannot be told."""
    with suppress(OSError, ValueError, IndexError):
        fields = (_PROC / str(pid) / "statm").read_text(encoding="ascii").split()
        return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")
    with suppress(psutil.Error, OSError):
        return int(psutil.Process(pid).memory_info().rss)
    return 0


def owner_uid(pid: int) -> int | None:
    """Return the user that a process runs as; None where it cannot be told."""
    with suppress(psutil.Error, OSError):
        return psutil.Process(pid).uids().effective
    return None


@cache
def machine_scope() -> str:
    """Return a name for the set of processes that ids and start times of this one belong to.

    It is another one after a reboot, and in another container.
    """
    parts = []
    with suppress(OSError):
        parts.append((_PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
    with suppress(OSError):
        parts.append(str((_PROC / "self/ns/pid").readlink()))
    return " ".join(parts)


def _started(pid: int) -> float | None:
    """When a process started; None if it has ended, or cannot be told."""
    if _IS_LINUX:
        return _ticks(pid)
    with suppress(psutil.Error, OSError):
        process = psutil.Process(pid)
        if process.status() != psutil.STATUS_ZOMBIE:
            return process.create_time()
    return None


def _ticks(pid: int) -> float | None:
    try:
        text = (_PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
        # The command's name stands in parentheses and may hold some itself.
        fields = text.rpartition(")")[2].split()
        return None if fields[_STATE_FIELD] in _ENDED else float(int(fields[_START_FIELD]))
    except (OSError, ValueError, IndexError):
        return None


def _proc_is_there() -> bool:
    return not _IS_LINUX or (_PROC / "self/stat").exists()


def _takes_signals(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True
