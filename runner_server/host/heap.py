"""Tuning of glibc's heap, so that freed memory returns to the system.

MLX's CPU arrays, gRPC's messages and the tokenizer all live in that heap. The functions do nothing
with other C libraries, which lack these calls.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8
_MADV_DONTNEED = 4

_MAP_FIELDS = 6
"""Number of fields in a line of /proc/self/maps that names a file."""

_MAPPED_BYTES = 1 << 20
"""Smallest block that is mapped separately, so that it returns to the system when freed. By default
the threshold grows with the blocks allocated, up to 32 MiB, and smaller freed arrays stay in the
heap between others."""

_ARENAS = 2
"""Number of heaps for threads. The default is eight per core, each of which keeps free pages."""


def settle_heap() -> None:
    """Make glibc return large blocks at once and use few arenas. Call at startup."""
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
    """Release the resident pages of libraries' code.

    These pages are the largest part of the memory that remains after an unload (9 MiB of libmlx.so
    after the first model), although they are not in use. The next call reads the pages that it
    needs from the file again. Only executable, read-only mappings are released, whose pages never
    change.

    Args:
        libraries: Prefixes of the libraries' file names.
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
