"""Resident memory of this process."""

from __future__ import annotations

import resource
import sys

import psutil

_UNIT_BYTES = 1 if sys.platform == "darwin" else 1024


def resident_bytes() -> int:
    """Return the resident set of this process in bytes, or its peak if that is unknown."""
    try:
        return int(psutil.Process().memory_info().rss)
    except (psutil.Error, OSError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT_BYTES
