"""Keep-alive of models."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runner_common.http.ollama.translation.fields import Fields

_UNITS = {
    "ns": 1e-9,
    "us": 1e-6,
    "\u00b5s": 1e-6,  # the micro sign, and the Greek letter
    "\u03bcs": 1e-6,
    "ms": 1e-3,
    "s": 1.0,
    "m": 60.0,
    "h": 3600.0,
}
_PART = rf"(\d{{1,20}}\.?\d{{0,20}}|\.\d{{1,20}})({'|'.join(_UNITS)})"
_DURATION = re.compile(rf"([+-]?)((?:{_PART}){{1,16}}|0)", re.ASCII)
_MAX_SECONDS = 2**63 / 1e9
"""Longest duration of the original, which is as good as none: 292 years."""


def read_keep_alive(fields: Fields) -> float | None:
    """Return the time for which an idle model stays loaded, in seconds.

    A number counts seconds, a text is a duration of Go such as ``"1h30m"``. Below zero means
    indefinitely.

    Returns:
        The time; ``inf`` for indefinitely; None if the request does not say.

    Raises:
        UnreadableRequestError: It is neither a number nor a duration.
    """
    name = "keep_alive"
    value = fields.value(name)
    if value is None:
        return None
    if isinstance(value, str):
        seconds = _duration(value)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        seconds = value
    else:
        seconds = None
    if seconds is None:
        fields.refuse(name, 'must be a number of seconds, or a duration such as "10m" or "1h30m"')
    return float(seconds) if 0 <= seconds < _MAX_SECONDS else math.inf


def _duration(text: str) -> float | None:
    match = _DURATION.fullmatch(text)
    if match is None:
        return None
    parts = re.findall(_PART, match[2], re.ASCII)
    seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    return -seconds if match[1] == "-" else seconds
