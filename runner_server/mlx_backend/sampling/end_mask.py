"""The mask that keeps end tokens out of the first ``min_predict`` tokens of a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from runner_server.engine.types import Sampling


@dataclass(frozen=True)
class _Entry:
    """A row with ``min_predict``: its index, and the options."""

    index: int
    sampling: Sampling


class EndMask:
    """Masks the end tokens of the rows that must not end yet.

    A step in which no row is masked costs a comparison of two integers for each row with
    ``min_predict``, and no array.

    Args:
        rows: The sampling options of each row.
    """

    def __init__(self, rows: Sequence[Sampling]) -> None:
        self._entries = [_Entry(i, row) for i, row in enumerate(rows) if row.end_ids]
        self._active: list[_Entry] = []
        self._masked: tuple[mx.array, mx.array] | None = None

    def __call__(self, logits: mx.array, drawn: Sequence[int]) -> mx.array:
        """Return logits in which masked tokens have -inf, shape ``(rows, vocabulary)``.

        Args:
            logits: Shape ``(rows, vocabulary)``; not changed.
            drawn: Number of tokens generated in each row.
        """
        active = [each for each in self._entries if drawn[each.index] < each.sampling.min_predict]
        if len(active) != len(self._active):
            # Rows only leave: each has drawn one token more in every step.
            self._active, self._masked = active, _indices(active)
        if self._masked is None:
            return logits
        # A new object, because an assignment to items changes the object that it is made on.
        masked = logits.astype(logits.dtype)
        masked[self._masked] = -mx.inf
        return masked


def _indices(entries: Sequence[_Entry]) -> tuple[mx.array, mx.array] | None:
    """Return the row and the id of each masked logit; None if there are none."""
    pairs = [(each.index, id_) for each in entries for id_ in each.sampling.end_ids]
    if not pairs:
        return None
    rows, ids = zip(*pairs, strict=True)
    return mx.array(rows), mx.array(ids)
