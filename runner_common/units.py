"""Parsing and formatting of sizes in bytes."""

from __future__ import annotations

import re

SIZE_FORMS = "8GiB, 512MiB or a number of bytes"
"""Forms of a size in help and error messages."""

# A limited number of digits, because Python refuses to convert thousands of them.
_SIZE = re.compile(r"([0-9]{1,30})(\.[0-9]{1,30})?\s*([KMGT]?)(i?B)?", re.IGNORECASE)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_bytes(text: str) -> int:
    """Parse a size such as ``8GiB``, ``8G`` (the same), ``8GB`` (8 * 10^9 bytes) or ``1000``.

    Raises:
        ValueError: The text is not a size.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or (match[2] and not match[3]):
        raise ValueError(f"{text[:40]!r} is not a size; use {SIZE_FORMS}")
    whole, fraction, prefix, unit = match.groups(default="")
    base = 1000 if prefix and unit.upper() == "B" else 1024
    # Exact in whole numbers; the module ``fractions`` would take 2 MiB of every runner.
    digits = fraction.removeprefix(".")
    scale: int = base ** _POWERS[prefix.upper()]
    return int(whole + digits) * scale // int("1" + "0" * len(digits))


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
