"""Child processes of a process and their memory, as the operating system reports them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import psutil


@dataclass(frozen=True, slots=True)
class Child:
    """Memory of one process.

    Attributes:
        pid: Process id.
        rss_bytes: Resident set, including pages shared with other processes.
        pss_bytes: Resident set with each shared page divided by the number of its users; the
            resident set where the system does not report it.
    """

    pid: int
    rss_bytes: int
    pss_bytes: int


def children(
    parent: psutil.Process,
    is_wanted: Callable[[psutil.Process], bool] | None = None,
    *,
    recursive: bool = True,
) -> Iterator[Child]:
    """Yield the living descendants of a process.

    Args:
        parent: The process.
        is_wanted: Selects descendants; default: every one.
        recursive: Whether to include children of children, which may be copies of their parent for
            a moment: forked, with the same command line and pages.
    """
    for process in parent.children(recursive=recursive):
        try:
            if is_wanted is None or is_wanted(process):
                yield _measure(process)
        except psutil.Error:
            # It has exited meanwhile.
            continue


def _measure(process: psutil.Process) -> Child:
    rss = int(process.memory_info().rss)
    try:
        pss = int(getattr(process.memory_full_info(), "pss", rss))
    except psutil.AccessDenied:
        pss = rss
    return Child(process.pid, rss, pss)


def every(seconds: float) -> Iterator[float]:
    """Yield the time at regular intervals, waiting in between; missed times are skipped.

    Args:
        seconds: Length of an interval.
    """
    begin = time.monotonic()
    while True:
        yield time.monotonic()
        time.sleep(seconds - (time.monotonic() - begin) % seconds)
