"""Log probabilities of a step's tokens, for the rows of a batch that request them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import mlx.core as mx

from runner_server.engine.logprobs import TokenLogprob
from runner_server.engine.types import Sampling
from runner_server.mlx_backend.arrays import rows_of
from runner_server.mlx_backend.sampling.logprobs import TokenLogprobs, token_logprobs


class _StepLogprobs:
    """The log probabilities of a step, read as a whole and shared by the rows.

    Reading a slice for each row would launch a computation that waits for the next step, which has
    already been launched by then.
    """

    def __init__(self, arrays: TokenLogprobs) -> None:
        self.arrays = arrays

    @cached_property
    def chosen(self) -> list[float]:
        return cast("list[float]", self.arrays.chosen.tolist())

    @cached_property
    def ids(self) -> list[list[int]]:
        return cast("list[list[int]]", self.arrays.ids.tolist())

    @cached_property
    def values(self) -> list[list[float]]:
        return cast("list[list[float]]", self.arrays.values.tolist())

    @cached_property
    def candidates(self) -> list[list[float]]:
        return cast("list[list[float]]", self.arrays.candidates.tolist())


@dataclass(frozen=True)
class RowLogprobs:
    """A row's entry in the log probabilities of a step."""

    step: _StepLogprobs
    index: int
    sampling: Sampling

    def read(self, token_id: int) -> TokenLogprob:
        """Wait for the entry; return it for the token that was drawn."""
        step, index, ids = self.step, self.index, self.sampling.logprob_token_ids
        top = tuple(zip(step.ids[index], step.values[index], strict=True))
        # Rows with fewer candidates are padded.
        candidates = tuple(zip(ids, step.candidates[index], strict=False)) if ids else ()
        top = top[: self.sampling.logprobs or 0]
        return TokenLogprob(token_id, step.chosen[index], top, candidates=candidates)


class BatchLogprobs:
    """Computes the log probabilities that the rows of a batch request.

    Args:
        rows: The sampling options of each row.
    """

    def __init__(self, rows: Sequence[Sampling]) -> None:
        self._count = len(rows)
        self._indices = [i for i, row in enumerate(rows) if row.logprobs is not None]
        self._selection = rows_of(self._indices, self._count)
        self._rows = [rows[index] for index in self._indices]
        self._top = max((row.logprobs or 0 for row in self._rows), default=0)
        self._candidates = _padded([row.logprob_token_ids for row in self._rows])

    def __call__(self, logits: mx.array, tokens: mx.array) -> list[RowLogprobs | None]:
        """Return the log probabilities of each row's token; None for rows that request none.

        Args:
            logits: The model's logits, shape ``(rows, vocabulary)``.
            tokens: The token drawn in each row, shape ``(rows,)``.
        """
        found: list[RowLogprobs | None] = [None] * self._count
        if not self._indices:
            return found
        if self._selection is not None:
            logits, tokens = logits[self._selection], tokens[self._selection]
        step = _StepLogprobs(token_logprobs(logits, tokens, self._top, self._candidates))
        for index, (slot, row) in enumerate(zip(self._indices, self._rows, strict=True)):
            found[slot] = RowLogprobs(step, index, row)
        return found


def arrays_of(found: RowLogprobs | None) -> tuple[mx.array, ...]:
    """Return the arrays to evaluate for a row."""
    if found is None:
        return ()
    arrays = found.step.arrays
    return arrays.chosen, arrays.ids, arrays.values, arrays.candidates


def _padded(rows: Sequence[Sequence[int]]) -> mx.array | None:
    """Return lists of ids as an array, padded with 0; None if all are empty."""
    width = max(map(len, rows), default=0)
    if not width:
        return None
    return mx.array([[*ids, *[0] * (width - len(ids))] for ids in rows], dtype=mx.int32)
