"""The C heap of the process: how glibc keeps and returns its pages.

MLX's arrays on a CPU, gRPC's messages and the tokenizer all live in it. Other C libraries have
none of these calls and are left as they are.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8
_MADV_DONTNEED = 4

_MAP_FIELDS = 6
"""Of a line of /proc/self/maps that names a file."""

_MAPPED_BYTES = 1 << 20
"""Blocks from this size on are mapped by themselves and go back to the system when they are
freed. glibc's own threshold grows to 32 MiB with the blocks it sees, after which freed arrays
stay in the heap between others."""

_ARENAS = 2
"""Heaps for threads. By default eight for each core, each of which keeps pages of its own."""


def settle_heap() -> None:
    """Have glibc return large blocks at once and keep few arenas. To be called at the start."""
    mallopt = getattr(_libc(), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)
        mallopt(_M_ARENA_MAX, _ARENAS)


def trim_heap() -> None:
    """Return the free pages of the heap to the system."""
    trim = getattr(_libc(), "malloc_trim", None)
    if trim is not None:
        trim(0)


def drop_code(libraries: tuple[str, ...]) -> None:
    """Let go of the pages of libraries' code that the process has touched.

    They are the largest part of what a model leaves behind (9 MiB of libmlx.so after the first
    one), although nothing of it is in use; the next call brings those back that it needs. Only
    mappings that are executable and not writable: nothing in them was ever changed.

    Args:
        libraries: Beginnings of file names.
    """
    madvise = getattr(_libc(), "madvise", None)
    if madvise is None:
        return
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:  # no /proc
        return
    for line in lines:
        fields = line.split(maxsplit=5)
        if len(fields) == _MAP_FIELDS and fields[1] == "r-xp":
            start, end = (int(part, 16) for part in fields[0].split("-"))
            if Path(fields[5]).name.startswith(libraries):
                madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED)


def _libc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if sys.platform == "linux" else None
