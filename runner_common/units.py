"""Formatting of numbers for people."""

from __future__ import annotations


def format_bytes(count: int) -> str:
    """Format a number of bytes in binary units, for instance ``"4.3 GiB"``."""
    value = float(count)
    if abs(value) < 1024:
        return f"{count} B"
    for unit in ("KiB", "MiB", "GiB"):
        value /= 1024
        # 1,023.95 and more would be rounded to 1024.0 of this unit.
        if abs(value) < 1023.95:
            return f"{value:.1f} {unit}"
    return f"{value / 1024:.1f} TiB"
