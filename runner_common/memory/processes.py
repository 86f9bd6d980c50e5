"""Identity and memory of other processes, from /proc or psutil."""

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
"""Indices of fields 3 and 22 of /proc/PID/stat after the command's name."""

_CREATE_TOLERANCE_SECONDS = 2.0
"""Largest difference between two readings of one start time, which depend on the wall clock."""


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """Identity of a process, different from that of later processes with the same id.

    Attributes:
        pid: Process id.
        started: Start time: ticks since boot on Linux, seconds since 1970 elsewhere; 0 if
            unknown.
    """

    pid: int
    started: float

    @classmethod
    def of(cls, pid: int) -> ProcessIdentity:
        """Return the identity of the current owner of a process id."""
        return cls(pid, _started(pid) or 0.0)

    @property
    def is_alive(self) -> bool:
        """True while this process runs; False for a zombie."""
        started = _started(self.pid)
        if started is None:
            # Without a readable /proc, the id alone must do.
            return self.started == 0 and not _proc_is_there() and _takes_signals(self.pid)
        if _IS_LINUX:
            return started == self.started
        return abs(started - self.started) <= _CREATE_TOLERANCE_SECONDS


def resident_bytes(pid: int) -> int:
    """Return the resident set of a process; 0 if unknown."""
    with suppress(OSError, ValueError, IndexError):
        fields = (_PROC / str(pid) / "statm").read_text(encoding="ascii").split()
        return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")
    with suppress(psutil.Error, OSError):
        return int(psutil.Process(pid).memory_info().rss)
    return 0


def owner_uid(pid: int) -> int | None:
    """Return the user id of a process; None if unknown."""
    with suppress(psutil.Error, OSError):
        return psutil.Process(pid).uids().effective
    return None


@cache
def machine_scope() -> str:
    """Return a name for the boot and the container in which process ids are valid."""
    parts = []
    with suppress(OSError):
        parts.append((_PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
    with suppress(OSError):
        parts.append(str((_PROC / "self/ns/pid").readlink()))
    return " ".join(parts)


def _started(pid: int) -> float | None:
    """Return the start time of a process; None if ended or unknown."""
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
        # The command's name is in parentheses, and may contain parentheses itself.
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
