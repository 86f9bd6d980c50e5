"""Collection of a request's validation errors by field, for messages of any type."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence

from runner_common.contract import MAX_LOGIT_BIASES
from runner_server.errors import InvalidField

_MAX_BIAS = 100.0


class ViolationCollector:
    """Collects the problems of a request, so that one answer names every invalid field."""

    def __init__(self) -> None:
        self._violations: list[tuple[str, str]] = []

    def require(self, field: str, ok: bool, text: str) -> None:
        """Record ``text`` as the problem of a field unless ``ok``."""
        if not ok:
            self._violations.append((field, text))

    def number(
        self, field: str, value: float, low: float, high: float, *, above: bool = False
    ) -> None:
        """Check the range of a number; ``above`` excludes the lower bound."""
        if isinstance(value, float):
            # A client's 0.01 arrives as the nearest 32-bit number, slightly below 0.01.
            low, high = _float32(low), _float32(high)
        inside = math.isfinite(value) and low <= value <= high and not (above and value == low)
        bounds = f"{'above ' if above else ''}{_plain(low)} to {_plain(high)}"
        self.require(field, inside, f"{_plain(value)} is not in the range {bounds}")

    def bias(self, field: str, bias: Mapping[int, float], vocab_size: int) -> None:
        """Check the logit biases of tokens."""
        if len(bias) > MAX_LOGIT_BIASES:
            many = f"{len(bias)} entries; at most {MAX_LOGIT_BIASES}"
            self.require(field, ok=False, text=many)
            return
        for token_id, value in bias.items():
            entry = f"{field}[{token_id}]"
            known = 0 <= token_id < vocab_size
            self.require(entry, known, f"not a token id: 0 to {vocab_size - 1}")
            # NaN compares false, so it is refused too.
            self.require(
                entry, -_MAX_BIAS <= value <= _MAX_BIAS, f"{value:g} is not in -100 to 100"
            )

    def token_ids(self, field: str, ids: Sequence[int], vocab_size: int, most: int) -> None:
        """Check a list of at most ``most`` token ids."""
        if len(ids) > most:
            # A message can have millions; checking each would block the event loop.
            self.require(field, ok=False, text=f"{len(ids)}; at most {most}")
            return
        for i, token_id in enumerate(ids):
            text = f"{token_id} is not a token id: 0 to {vocab_size - 1}"
            self.require(f"{field}[{i}]", 0 <= token_id < vocab_size, text)

    def finish(self) -> None:
        """Raise the collected violations, if any.

        Raises:
            InvalidField: At least one check failed.
        """
        if self._violations:
            raise InvalidField(self._violations)


def check_token_ids(field: str, ids: Sequence[int], vocab_size: int) -> None:
    """Check token ids against the vocabulary.

    Raises:
        InvalidField: An id is not in the vocabulary; the error names the first such id.
    """
    if not ids or (min(ids) >= 0 and max(ids) < vocab_size):
        return
    at, bad = next((i, id_) for i, id_ in enumerate(ids) if not 0 <= id_ < vocab_size)
    raise InvalidField([(f"{field}[{at}]", f"{bad} is not a token id: 0 to {vocab_size - 1}")])


def _float32(value: float) -> float:
    (nearest,) = struct.unpack("f", struct.pack("f", value))
    return float(nearest)


def _plain(value: float) -> str:
    """Format a number for people, without an exponent for integers."""
    return str(value) if isinstance(value, int) else f"{value:g}"
