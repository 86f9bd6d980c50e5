"""Sampling strategies, which differ in their candidates for the next token.

| strategy | options | candidates |
|---|---|---|
| :class:`Greedy` | ``temperature`` 0 | the most likely token |
| :class:`TopCandidates` | ``top_k`` | the 64, 256 or 1,024 most likely tokens |
| :class:`Nucleus` | ``top_p`` without ``top_k`` | the 1,024 most likely tokens, or all |
| :class:`WholeVocabulary` | neither | all tokens |

One pass over the whole vocabulary finds the candidates, and all later steps work on these. The
strategy of a row depends only on the row's own options, so that a row draws the same tokens alone
and in a batch.

All but :class:`Greedy` add noise to the logits and take the maximum, which is a draw from their
softmax (Gumbel-max, https://arxiv.org/abs/1611.01144).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from runner_common.contract import MAX_PARALLEL
from runner_server.engine.types import Sampling
from runner_server.mlx_backend.arrays import row_array
from runner_server.mlx_backend.sampling.noise import negative_gumbel
from runner_server.mlx_backend.sampling.reductions import argmax
from runner_server.mlx_backend.sampling.selection import in_order, largest

_CANDIDATES = (64, 256, 1024)
"""Numbers of candidates: the first that is at least ``top_k``, or else the whole vocabulary."""

_NUCLEUS = 1024
"""Number of candidates tried first for a ``top_p`` without ``top_k``. It usually suffices."""

_IN_ORDER_BYTES = 4 << 20
"""Bytes of whole-vocabulary logits to sort in one call. Sorting takes seven times that memory:
130 MiB for 32 rows of 151,936."""

_MIN_TOP_P = 1e-9
"""Smallest ``top_p``. Devices may flush a much smaller number to 0, which would keep no token."""

_MIN_TEMPERATURE = 1e-9
"""Smallest temperature. Division by a smaller one could overflow float32, and at this one all
scores are far apart already."""


class Greedy:
    """Takes the most likely token of each row."""

    def __call__(
        self, logits: mx.array, _positions: Sequence[int], ids: mx.array | None = None
    ) -> mx.array:
        """Return token ids, shape ``(rows,)``; see ``Sampler.__call__``."""
        return _chosen(ids, argmax(logits))


class RandomStrategy(ABC):
    """Draws from the candidates that top-k, top-p and min-p leave in each row.

    Args:
        rows: The sampling options of each row.
        count: Number of candidates.
    """

    def __init__(self, rows: Sequence[Sampling], count: int) -> None:
        self._count = count
        self._seeds = [row.seed for row in rows]
        self._temperature = row_array([max(row.temperature, _MIN_TEMPERATURE) for row in rows])
        self._top_p = row_array([_top_p(row) for row in rows])
        self._min_p = mx.log(row_array([row.min_p for row in rows]))
        self._cuts_k = any(0 < row.top_k < count for row in rows)
        self._cuts_top_p = any(row.top_p < 1 for row in rows)
        self._cuts_min_p = any(row.min_p > 0 for row in rows)
        if self._cuts_k:
            # Candidates are sorted, smallest first.
            least = row_array([count - (row.top_k or count) for row in rows])
            self._top_k = mx.arange(count) >= least

    def __call__(
        self, logits: mx.array, positions: Sequence[int], ids: mx.array | None = None
    ) -> mx.array:
        """Return token ids, shape ``(rows,)``; see ``Sampler.__call__``."""
        logits = logits.astype(mx.float32)
        ids, scores = self._cut(ids, logits) if ids is not None else self._candidates(logits)
        if self._cuts_min_p:
            scores = mx.where(scores < self._min_p, -mx.inf, scores)
        scores = scores - negative_gumbel(self._seeds, positions, ids)
        choice = argmax(scores)
        return choice if len(ids) < len(scores) else _chosen(ids, choice)  # all ids, in order

    @abstractmethod
    def _candidates(self, logits: mx.array) -> tuple[mx.array, mx.array]:
        """Return ids, and their scores after top-k and top-p.

        A score is the logit less the row's maximum, divided by the temperature, so it is at most 0.
        The score of an excluded id is -inf.

        Returns:
            Ids of shape ``(rows, n)``, or ``(1, n)`` for all ids in order; scores, ``(rows, n)``.
        """

    def _cut(self, ids: mx.array, logits: mx.array) -> tuple[mx.array, mx.array]:
        """Return ids and scores; top-k and top-p give excluded ids a score of -inf."""
        if not (self._cuts_k or self._cuts_top_p):
            return ids, self._scale(logits, mx.max(logits, axis=-1, keepdims=True))
        ids, logits = in_order(ids, logits)
        scores = self._scale(logits, logits[:, -1:])
        if self._cuts_k:
            scores = mx.where(self._top_k, scores, -mx.inf)
        if self._cuts_top_p:
            scores = mx.where(self._kept_by_top_p(scores), scores, -mx.inf)
        return ids, scores

    def _kept_by_top_p(self, scores: mx.array) -> mx.array:
        return self._within_top_p(mx.softmax(scores, axis=-1))

    def _scale(self, logits: mx.array, most: mx.array) -> mx.array:
        return (logits - most) / self._temperature

    def _within_top_p(self, probs: mx.array) -> mx.array:
        """Return which ids top-p keeps, given probabilities sorted from the smallest."""
        # The sum of the probabilities above the last one is 0, so at least that id stays.
        return mx.cumsum(probs, axis=-1, reverse=True) - probs < self._top_p


class TopCandidates(RandomStrategy):
    """Draws from a fixed number of the most likely tokens, at least ``top_k``."""

    def _candidates(self, logits: mx.array) -> tuple[mx.array, mx.array]:
        return self._cut(*largest(logits, self._count))


class WholeVocabulary(RandomStrategy):
    """Draws from all tokens."""

    def _candidates(self, logits: mx.array) -> tuple[mx.array, mx.array]:
        return self._cut(mx.arange(logits.shape[-1], dtype=mx.uint32)[None], logits)


class Nucleus(WholeVocabulary):
    """Draws from the nucleus of top-p, which is usually among the 1,024 most likely tokens.

    For example, with ``top_p`` 0.9 and 151,936 tokens: if the 1,024 most likely tokens have a
    probability of 0.97 together, the nucleus is among them, and nothing else is sorted. If they
    have 0.6, as at a high temperature, all tokens are sorted.
    """

    def _candidates(self, logits: mx.array) -> tuple[mx.array, mx.array]:
        return self._among_likely(logits) or super()._candidates(logits)

    def _kept_by_top_p(self, scores: mx.array) -> mx.array:
        # Ties are treated as in `_among_likely`, so that a row draws the same token either way.
        return scores >= _lowest(scores, super()._kept_by_top_p(scores))

    def _among_likely(self, logits: mx.array) -> tuple[mx.array, mx.array] | None:
        """Return the nucleus, or None if it is not among the most likely tokens."""
        ids, top = in_order(*largest(logits, _NUCLEUS))
        most = top[:, -1:]
        total = mx.logsumexp(self._scale(logits, most), axis=-1, keepdims=True)
        scores = self._scale(top, most)
        lowest = _lowest(scores, self._within_top_p(mx.exp(scores - total)))
        # `item` waits for the step, but sorting the whole vocabulary would take far longer.
        if not mx.all(lowest > scores[:, :1]).item():
            return None
        return ids, mx.where(scores < lowest, -mx.inf, scores)


Strategy = Greedy | RandomStrategy


@dataclass(frozen=True)
class StrategyChoice:
    """The strategy of a row; rows with equal choices are sampled together.

    Attributes:
        kind: Class of the strategy.
        count: Number of candidates.
        rows_at_once: Most rows in one call: few if the whole vocabulary is sorted.
    """

    kind: type[Greedy | TopCandidates | Nucleus | WholeVocabulary]
    count: int = 1
    rows_at_once: int = MAX_PARALLEL

    @classmethod
    def of(cls, sampling: Sampling, vocab_size: int) -> StrategyChoice:
        """Return the strategy for a row's options."""
        if sampling.temperature == 0:
            return cls(Greedy)
        k = sampling.top_k or vocab_size
        count = next((count for count in _CANDIDATES if k <= count < vocab_size), vocab_size)
        if count < vocab_size:
            return cls(TopCandidates, count)
        rows_at_once = max(1, _IN_ORDER_BYTES // (4 * vocab_size))
        is_nucleus = k == vocab_size and sampling.top_p < 1 and vocab_size > 2 * _NUCLEUS
        return cls(Nucleus if is_nucleus else WholeVocabulary, vocab_size, rows_at_once)

    def strategy(self, rows: Sequence[Sampling]) -> Strategy:
        """Return the strategy for a group of rows."""
        return Greedy() if issubclass(self.kind, Greedy) else self.kind(rows, self.count)


def _chosen(ids: mx.array | None, places: mx.array) -> mx.array:
    """Return the id at a place of each row."""
    return places if ids is None else mx.take_along_axis(ids, places[:, None], axis=-1)[:, 0]


def _lowest(scores: mx.array, kept: mx.array) -> mx.array:
    """Return the lowest score kept, so that ids with equal scores are all kept or all excluded."""
    return mx.min(mx.where(kept, scores, mx.inf), axis=-1, keepdims=True)


def _top_p(row: Sampling) -> float:
    """Return the row's ``top_p``; if off, a value above any rounded sum of probabilities."""
    return max(row.top_p, _MIN_TOP_P) if row.top_p < 1 else 2.0
