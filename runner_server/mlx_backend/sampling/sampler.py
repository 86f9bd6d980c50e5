"""Draws the next tokens of all rows together: top-k, temperature, top-p, min-p, keyed noise.

The whole vocabulary is looked at once, to find the candidates; everything after
that works on those. How many there are follows from a row's own ``top_k`` and not
from its neighbours', so a row is drawn alike alone and in a batch.

Every draw adds noise to the logits and takes the maximum, which draws from their
softmax (Gumbel-max, https://arxiv.org/abs/1611.01144). The noise is a function of
the request's seed, the token's position and the token's id: never MLX's global
state, which is per thread and which an exception can poison, and never the place
among the candidates, so that the rounding differences between a batch and a single
row do not move it.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx

from runner_server.engine.types import MAX_PARALLEL, Sampling
from runner_server.mlx_backend.arrays import row_array, rows_of

_CANDIDATES = (64, 256, 1024)
"""How many are looked at for a ``top_k`` up to that; above, the whole vocabulary is."""

_NUCLEUS = 1024
"""How many are looked at first for a ``top_p`` without ``top_k``; mostly they are enough."""

_IN_ORDER_BYTES = 4 << 20
"""Logits that are put in order in one call, of the whole vocabulary. It takes seven times their
memory: 130 MiB for 32 rows of 151,936."""

_MIN_TOP_P = 1e-9
"""Devices may take a number much smaller for 0, and then nothing would be kept."""

_MIN_TEMPERATURE = 1e-9
"""Below it a quotient could leave float32; any two logits that differ are far apart by then."""

_LOW_64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _words(values: Iterable[int]) -> mx.array:
    """Words of 64 bits, evaluated; from a list MLX reads no integer from 2^63 on."""
    return mx.array(cast("Any", memoryview(array("Q", values))))


_WORD_GOLDEN, _WORD_1, _WORD_2 = _words([_GOLDEN]), _words([_MIX_1]), _words([_MIX_2])


class Sampler:
    """Draws one token for each row of a batch.

    Rows are grouped by where their candidates come from; a batch whose rows ask for
    about the same is one group, whatever else they ask for.

    Args:
        rows: The options of each row.
        vocab_size: Token ids there are.
    """

    def __init__(self, rows: Sequence[Sampling], vocab_size: int) -> None:
        sources: dict[_Source, list[int]] = {}
        for index, sampling in enumerate(rows):
            sources.setdefault(_Source.of(sampling, vocab_size), []).append(index)
        groups = [
            (source, indices[start : start + most])
            for source, indices in sources.items()
            for most in [_rows_at_once(source, vocab_size)]
            for start in range(0, len(indices), most)
        ]
        self._groups = [
            (indices, rows_of(indices, len(rows)), _Draw([rows[i] for i in indices], source))
            for source, indices in groups
        ]
        order = [index for _, indices in groups for index in indices]
        inverse = sorted(range(len(order)), key=order.__getitem__)
        self._inverse = mx.array(inverse) if len(groups) > 1 else None

    def __call__(self, logits: mx.array, positions: Sequence[int]) -> mx.array:
        """Draws a token for each row.

        Args:
            logits: [rows, vocabulary].
            positions: How many tokens of each row were drawn before.

        Returns:
            [rows] token ids.
        """
        drawn: list[mx.array] = []
        for indices, selection, draw in self._groups:
            # One group after the other: their arrays are not to be there at the same time.
            (given,) = mx.depends([logits], drawn[-1:]) if drawn else (logits,)
            chosen = given if selection is None else given[selection]
            drawn.append(draw(chosen, [positions[index] for index in indices]))
        return drawn[0] if self._inverse is None else mx.concatenate(drawn)[self._inverse]


@dataclass(frozen=True)
class _Source:
    """Where a row's candidates come from.

    Attributes:
        count: 0 for the most likely token only; else so many of the most likely ones.
        is_nucleus: Of the whole vocabulary, those that top-p leaves: mostly few.
    """

    count: int
    is_nucleus: bool = False

    @classmethod
    def of(cls, sampling: Sampling, vocab_size: int) -> _Source:
        if sampling.temperature == 0:
            return cls(0)
        k = sampling.top_k or vocab_size
        count = next((count for count in _CANDIDATES if k <= count < vocab_size), vocab_size)
        few = k == vocab_size and sampling.top_p < 1 and vocab_size > 2 * _NUCLEUS
        return cls(count, is_nucleus=few)


def _rows_at_once(source: _Source, vocab_size: int) -> int:
    """How many rows are drawn in one call: few where the whole vocabulary is put in order."""
    if source.count < vocab_size:
        return MAX_PARALLEL
    return max(1, _IN_ORDER_BYTES // (4 * vocab_size))


class _Draw:
    """Draws for rows whose candidates come from the same source.

    Args:
        rows: Their options.
        source: Where the candidates come from.
    """

    def __init__(self, rows: Sequence[Sampling], source: _Source) -> None:
        count = self._count = source.count
        self._is_nucleus = source.is_nucleus
        self._seeds = [row.seed for row in rows]
        self._temperature = row_array([max(row.temperature, _MIN_TEMPERATURE) for row in rows])
        self._top_p = row_array([_top_p(row) for row in rows])
        self._min_p = mx.log(row_array([row.min_p for row in rows]))
        self._cuts_k = any(0 < row.top_k < count for row in rows)
        self._cuts_top_p = any(row.top_p < 1 for row in rows)
        self._cuts_min_p = any(row.min_p > 0 for row in rows)
        if self._cuts_k:
            # Candidates are in order, the smallest first.
            least = row_array([count - (row.top_k or count) for row in rows])
            self._top_k = mx.arange(count) >= least

    def __call__(self, logits: mx.array, positions: Sequence[int]) -> mx.array:
        if not self._count:
            return mx.argmax(logits, axis=-1)
        ids, scores = self._candidates(logits.astype(mx.float32))
        if self._cuts_min_p:
            scores = mx.where(scores < self._min_p, -mx.inf, scores)
        scores = scores - negative_gumbel(self._seeds, positions, ids)
        choice = mx.argmax(scores, axis=-1, keepdims=True)
        if len(ids) < len(scores):  # all ids, in order
            return choice[:, 0]
        return mx.take_along_axis(ids, choice, axis=-1)[:, 0]

    def _candidates(self, logits: mx.array) -> tuple[mx.array, mx.array]:
        """Ids that top-k and top-p leave, and their scores: logits over temperature.

        Scores are at most 0; those of ids that are left out after all are -inf.
        """
        if self._count < logits.shape[-1]:
            return self._cut(*largest(logits, self._count))
        found = self._nucleus(logits) if self._is_nucleus else None
        return found or self._cut(mx.arange(logits.shape[-1], dtype=mx.uint32)[None], logits)

    def _cut(self, ids: mx.array, logits: mx.array) -> tuple[mx.array, mx.array]:
        """Divides by the temperature and leaves out what top-k and top-p do."""
        if not (self._cuts_k or self._cuts_top_p):
            return ids, self._scale(logits, mx.max(logits, axis=-1, keepdims=True))
        ids, logits = _in_order(ids, logits)
        scores = self._scale(logits, logits[:, -1:])
        if self._cuts_k:
            scores = mx.where(self._top_k, scores, -mx.inf)
        if self._cuts_top_p:
            kept = self._within_top_p(mx.softmax(scores, axis=-1))
            if self._is_nucleus:
                kept = scores >= _lowest(scores, kept)
            scores = mx.where(kept, scores, -mx.inf)
        return ids, scores

    def _nucleus(self, logits: mx.array) -> tuple[mx.array, mx.array] | None:
        """The same as :meth:`_cut` for top-p alone, unless so many ids are too few."""
        ids, top = _in_order(*largest(logits, _NUCLEUS))
        most = top[:, -1:]
        total = mx.logsumexp(self._scale(logits, most), axis=-1, keepdims=True)
        scores = self._scale(top, most)
        lowest = _lowest(scores, self._within_top_p(mx.exp(scores - total)))
        # Waits for the step; a sort of the whole vocabulary would take far longer.
        if not mx.all(lowest > scores[:, :1]).item():
            return None
        return ids, mx.where(scores < lowest, -mx.inf, scores)

    def _scale(self, logits: mx.array, most: mx.array) -> mx.array:
        return (logits - most) / self._temperature

    def _within_top_p(self, probs: mx.array) -> mx.array:
        """Which ids top-p keeps; they are in order, the least likely first."""
        # The last has nothing above it, so one always stays.
        return mx.cumsum(probs, axis=-1, reverse=True) - probs < self._top_p


def _lowest(scores: mx.array, kept: mx.array) -> mx.array:
    """The lowest score that is kept: of equally likely ids all are to be kept, or none."""
    return mx.min(mx.where(kept, scores, mx.inf), axis=-1, keepdims=True)


def _in_order(ids: mx.array, scores: mx.array) -> tuple[mx.array, mx.array]:
    """The smallest scores first."""
    order = mx.argsort(scores, axis=-1)
    scores = mx.take_along_axis(scores, order, axis=-1)
    if len(ids) < len(order):  # all ids, in order
        return order, scores
    return mx.take_along_axis(ids, order, axis=-1), scores


def _top_p(row: Sampling) -> float:
    """Above any sum of probabilities, however it was rounded, where it is off."""
    return max(row.top_p, _MIN_TOP_P) if row.top_p < 1 else 2.0


def largest(logits: mx.array, count: int) -> tuple[mx.array, mx.array]:
    """The largest logits of each row and their ids, in no order.

    The ``count`` largest lie in the ``count`` blocks with the largest maxima, so only
    those are searched: a tenth of the time of a search through 151,936 of them.

    Args:
        logits: [rows, ids].
        count: How many; all if there are no more.

    Returns:
        Ids and logits; both [rows, count].
    """
    size = logits.shape[-1]
    if count >= size:
        return mx.broadcast_to(mx.arange(size), logits.shape), logits
    # As many blocks as logits in the chosen ones, about: both are searched.
    block = 1 << ((size // count).bit_length() // 2)
    blocks = -(-size // block)
    if blocks <= 2 * count:
        ids = mx.argpartition(logits, kth=-count, axis=-1)[:, -count:]
        return ids, mx.take_along_axis(logits, ids, axis=-1)
    if blocks * block > size:
        padding = [(0, 0), (0, blocks * block - size)]
        logits = mx.pad(logits, padding, constant_values=mx.array(-mx.inf, logits.dtype))
    # A block is every blocks-th logit: maxima over rows of a table are the fast ones.
    table = logits.reshape(-1, block, blocks)
    best = mx.argpartition(mx.max(table, axis=1), kth=-count, axis=-1)[:, None, -count:]
    ids = (best + mx.arange(0, block * blocks, blocks)[:, None]).flatten(1)
    values = mx.take_along_axis(table, best, axis=2).flatten(1)
    chosen = mx.argpartition(values, kth=-count, axis=-1)[:, -count:]
    return mx.take_along_axis(ids, chosen, axis=-1), mx.take_along_axis(values, chosen, axis=-1)


def negative_gumbel(seeds: Sequence[int], positions: Sequence[int], ids: mx.array) -> mx.array:
    """Noise for each id whose negative has a Gumbel distribution; float32, shaped as ``ids``.

    The bits are splitmix64's (https://prng.di.unimi.it/splitmix64.c): its output for
    seed and position is the state of a generator whose outputs are numbered by id.

    Args:
        seeds: Of each row.
        positions: Of each row.
        ids: [rows, n] token ids; with one row they stand for all.
    """
    pairs = zip(seeds, positions, strict=True)
    states = (_splitmix(seed + (position + 1) * _GOLDEN) for seed, position in pairs)
    first = _words((state + _GOLDEN) & _LOW_64 for state in states)
    bits = _mix(first[:, None] + ids.astype(mx.uint64) * _WORD_GOLDEN)
    # 23 bits and a half: float32 holds every such number, and none is 0 or 1.
    uniform = ((bits >> 41).astype(mx.float32) + 0.5) * 2.0**-23
    return mx.log(-mx.log(uniform))


def _splitmix(state: int) -> int:
    state &= _LOW_64
    state = ((state ^ (state >> 30)) * _MIX_1) & _LOW_64
    state = ((state ^ (state >> 27)) * _MIX_2) & _LOW_64
    return state ^ (state >> 31)


def _mix(state: mx.array) -> mx.array:
    """The same as :func:`_splitmix`, of many states."""
    state = (state ^ (state >> 30)) * _WORD_1
    state = (state ^ (state >> 27)) * _WORD_2
    return state ^ (state >> 31)


def are_finite(logits: mx.array, drawn: mx.array) -> mx.array:
    """Whether the logits of each row are numbers; some may be -inf, of tokens that are barred.

    A sum is NaN or infinite wherever one of them is, on every device, and half the work of the
    search for the largest (1.3 ms for 16 x 151,936 on a CPU; 3.1 for ``max``, 33 for
    ``logsumexp``). A row that draws a barred token has no other: its logits are all -inf.

    Args:
        logits: [rows, vocabulary].
        drawn: The token of each row; may be any number where the logits are not finite.

    Returns:
        [rows] booleans.
    """
    if logits.dtype == mx.float16:
        # The sum of many numbers leaves the range of float16 where none of them does.
        logits = logits.astype(mx.float32)
    bounded = mx.sum(logits, axis=-1) < mx.inf
    chosen = mx.take_along_axis(logits, mx.where(bounded, drawn, 0)[:, None], axis=-1)[:, 0]
    return bounded & (chosen > -mx.inf)


@dataclass(frozen=True)
class TokenLogprobs:
    """How likely the drawn tokens of some rows were; arrays not yet evaluated.

    Attributes:
        chosen: Log probability of the drawn token; [rows].
        ids: The most likely ids, most likely first; [rows, n].
        values: Their log probabilities; [rows, n].
    """

    chosen: mx.array
    ids: mx.array
    values: mx.array


def token_logprobs(logits: mx.array, tokens: mx.array, top: int) -> TokenLogprobs:
    """Log probabilities of drawn tokens and of the ``top`` most likely ones.

    Args:
        logits: As the model gave them; [rows, vocabulary].
        tokens: [rows].
        top: How many; 0 for none.
    """
    logits = logits.astype(mx.float32)
    total = mx.logsumexp(logits, axis=-1, keepdims=True)
    chosen = mx.take_along_axis(logits, tokens[:, None].astype(mx.int32), axis=-1) - total
    if not top:
        nothing = mx.zeros((logits.shape[0], 0))
        return TokenLogprobs(mx.minimum(chosen[:, 0], 0.0), nothing.astype(mx.int32), nothing)
    ids, values = largest(logits, top)
    order = mx.argsort(-values, axis=-1)
    values = mx.take_along_axis(values, order, axis=-1) - total
    return TokenLogprobs(
        mx.minimum(chosen[:, 0], 0.0),
        mx.take_along_axis(ids, order, axis=-1),
        mx.minimum(values, 0.0),
    )
