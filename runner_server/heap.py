"""The C heap of the process: how glibc keeps and returns its pages.

MLX's arrays on a CPU, gRPC's messages and the tokenizer all live in it. Other C libraries have
none of these calls and are left as they are.
"""

from __future__ import annotations

import ctypes
import sys

_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8

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


def _libc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if sys.platform == "linux" else None
