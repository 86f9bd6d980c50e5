"""``logit_bias`` and the three penalties, applied to logits before sampling.

Only the logits of the affected tokens are computed, never the whole vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx

from runner_server.engine.types import Sampling
from runner_server.mlx_backend.arrays import row_array, rows_of

_NONE = Sampling()


class Penalties:
    """The bias and penalties of the rows of a batch.

    Args:
        rows: The sampling options of each row.
    """

    def __init__(self, rows: Sequence[Sampling]) -> None:
        self._bias = _bias([row.logit_bias for row in rows])
        self._over_window = _WindowPenalties([_over_window(row) for row in rows])
        self._over_output = _WindowPenalties([_over_output(row) for row in rows])

    @property
    def reads_histories(self) -> bool:
        """True if any row has a penalty, which depends on its tokens."""
        return bool(self._over_window.indices or self._over_output.indices)

    def __call__(
        self,
        logits: mx.array,
        histories: Sequence[Sequence[int]],
        inputs: mx.array,
        drawn: Sequence[int],
    ) -> mx.array:
        """Return logits with bias and penalties applied, shape ``(rows, vocabulary)``.

        Args:
            logits: The model's logits, shape ``(rows, vocabulary)``.
            histories: The tokens of each row, without the newest one.
            inputs: The newest token of each row, shape ``(rows,)``, possibly unevaluated.
            drawn: Number of tokens generated in each row, including the newest one.
        """
        if self._bias is not None:
            rows, ids, values = self._bias
            logits = logits.astype(mx.float32).at[rows, ids].add(values)
        if self._over_window.indices:
            logits = self._over_window(logits, histories, inputs)
        if self._over_output.indices:
            generated = [
                history[len(history) - max(0, count - 1) :]
                for history, count in zip(histories, drawn, strict=True)
            ]
            logits = self._over_output(logits, generated, inputs, [count > 0 for count in drawn])
        return logits


class _WindowPenalties:
    """Penalties over one window of each row's tokens.

    Args:
        rows: The sampling options of each row.

    Attributes:
        indices: The indices of the rows with penalties.
    """

    def __init__(self, rows: Sequence[Sampling]) -> None:
        self.indices = [index for index, row in enumerate(rows) if _penalizes(row)]
        self._index = rows_of(self.indices, len(rows))
        chosen = [rows[index] for index in self.indices]
        self._windows = [row.repeat_last_n for row in chosen]
        self._repeat = row_array([row.repeat_penalty for row in chosen])
        self._presence = row_array([row.presence_penalty for row in chosen])
        self._frequency = row_array([row.frequency_penalty for row in chosen])

    def __call__(
        self,
        logits: mx.array,
        histories: Sequence[Sequence[int]],
        inputs: mx.array,
        has_newest: Sequence[bool] = (),
    ) -> mx.array:
        """Return penalized logits, shape ``(rows, vocabulary)``.

        Args:
            logits: Shape ``(rows, vocabulary)``.
            histories: The tokens of each row, without the newest one.
            inputs: The newest token of each row, shape ``(rows,)``.
            has_newest: Whether the newest token of each row is in its window; empty if all are.
        """
        windows = [
            _window(histories[index], size)
            for index, size in zip(self.indices, self._windows, strict=True)
        ]
        weight = (
            row_array([float(has_newest[index]) for index in self.indices]) if has_newest else 1
        )
        if self._index is None:
            return self._penalize(logits, windows, inputs, weight)
        changed = self._penalize(logits[self._index], windows, inputs[self._index], weight)
        logits = logits.astype(mx.float32)
        logits[self._index] = changed
        return logits

    def _penalize(
        self,
        logits: mx.array,
        windows: Sequence[Sequence[int]],
        newest: mx.array,
        weight: mx.array | int,
    ) -> mx.array:
        # float32, because bfloat16 cannot count past 256.
        logits = logits.astype(mx.float32)
        ids, counts = _count(windows, newest.astype(mx.int32)[:, None], weight)
        values = mx.take_along_axis(logits, ids, axis=-1)
        divided = mx.where(values > 0, values / self._repeat, values * self._repeat)
        penalized = divided - self._presence - counts * self._frequency
        penalized = mx.where(counts > 0, penalized, values)
        return mx.put_along_axis(logits, ids, penalized, axis=-1)


def _over_window(row: Sampling) -> Sampling:
    """Return a row's options, limited to penalties over the last ``repeat_last_n`` tokens."""
    if not row.counts_output_only:
        return row
    return replace(row, presence_penalty=0.0, frequency_penalty=0.0)


def _over_output(row: Sampling) -> Sampling:
    """Return a row's options, limited to penalties over the whole output."""
    if not row.counts_output_only:
        return _NONE
    return replace(row, repeat_penalty=1.0, repeat_last_n=-1)


def _penalizes(row: Sampling) -> bool:
    plain = (row.repeat_penalty, row.presence_penalty, row.frequency_penalty)
    return row.repeat_last_n != 0 and plain != (1.0, 0.0, 0.0)


def _bias(rows: Sequence[tuple[tuple[int, float], ...]]) -> tuple[mx.array, ...] | None:
    """Return row index, token id and value of every biased logit; None without any."""
    entries = [(index, *pair) for index, pairs in enumerate(rows) for pair in pairs]
    if not entries:
        return None
    indices, ids, values = zip(*entries, strict=True)
    return mx.array(indices), mx.array(ids), mx.array(values, dtype=mx.float32)


def _window(history: Sequence[int], size: int) -> Sequence[int]:
    """Return the tokens in a window of ``size``, except for the newest; -1 for all tokens."""
    if size < 0:
        return history
    return history[-(size - 1) :] if size > 1 else ()


def _count(
    windows: Sequence[Sequence[int]], newest: mx.array, weight: mx.array | int
) -> tuple[mx.array, mx.array]:
    """Return the ids in each row's window and the number of occurrences, both ``(rows, n)``.

    An id may appear more than once, each time with its full count. The newest token adds ``weight``
    to its count. An id with a count of 0 is not in the window.

    For example, with the windows ``[7, 7, 9]`` and ``[]``, the newest tokens 7 and 5, and a weight
    of 1, the ids are ``[[7, 9, 7], [5, 5, 5]]`` and the counts ``[[3, 1, 3], [1, 1, 1]]``: the last
    column is the newest token, and the row without a window repeats it.
    """
    seen = [Counter(window) for window in windows]
    width = max(map(len, seen))
    # Rows with fewer ids repeat one of them. -1, for a row without any, becomes the newest token.
    fillers = [next(iter(counter.items()), (-1, 0)) for counter in seen]
    padded = [
        [*counter.items(), *[filler] * (width - len(counter))]
        for counter, filler in zip(seen, fillers, strict=True)
    ]
    ids = mx.array([[id_ for id_, _ in row] for row in padded], dtype=mx.int32)
    counts = mx.array([[float(count) for _, count in row] for row in padded])
    ids, counts = ids.reshape(len(padded), width), counts.reshape(len(padded), width)
    ids = mx.where(ids < 0, newest, ids)
    same = ids == newest
    # All columns with the newest id have the same count, so the maximum is that count.
    before = mx.max(mx.concatenate([mx.where(same, counts, 0), mx.zeros(newest.shape)], 1), 1)
    return (
        mx.concatenate([ids, newest], axis=1),
        mx.concatenate([counts + same * weight, before[:, None] + weight], axis=1),
    )
