"""The decode step: computes the next tokens of several rows together.

:meth:`DecodeBatch.step` launches a step before it reads the tokens of the previous one, so that the
device always has work. The inputs of a step are the arrays that the previous step is still
computing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import cast

import mlx.core as mx
from mlx.nn.layers.base import Module

from runner_server.engine.types import NotFinite, Sampling, Token, TokenLogprob
from runner_server.mlx_backend.arrays import rows_of
from runner_server.mlx_backend.cache.row_caches import (
    Caches,
    compact,
    evaluate,
    extend,
    extract,
    keep,
    merge,
    view,
)
from runner_server.mlx_backend.sampling.penalties import Penalties
from runner_server.mlx_backend.sampling.sampler import (
    Sampler,
    TokenLogprobs,
    are_finite,
    token_logprobs,
)

_STATE_STEPS = 64
"""Number of steps after which the state of all caches is evaluated. Where nothing reads a layer's
offset, the lazy offset would otherwise grow by one addition per step."""


Agree = Callable[[mx.array], mx.array]


@dataclass(eq=False)
class Row:
    """A row of the batch, also during prefill and preemption.

    Attributes:
        id: The engine's id of the row.
        sampling: The sampling options.
        tokens: The tokens that have passed through the model.
        next_id: The next input token, if known.
        is_unreported: Whether the next input token was generated and has not been reported.
        drawn: Number of tokens drawn.
        caches: The row's caches while it is not in the batch.
        logprobs: Log probabilities of the next input token, if requested.
        is_finite: Whether the logits that the next input token was drawn from are finite, as far as
            they have been read.
    """

    id: int
    sampling: Sampling
    tokens: list[int]
    next_id: int
    is_unreported: bool = False
    drawn: int = 0
    caches: Caches = field(default_factory=list)
    logprobs: _RowLogprobs | None = None
    is_finite: bool = True


class _StepLogprobs:
    """The log probabilities of a step, read once and shared by the rows.

    Slicing an array would launch a computation that waits for the step launched in the meantime.
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


@dataclass(frozen=True)
class _RowLogprobs:
    """A row's entry in the log probabilities of a step."""

    step: _StepLogprobs
    index: int

    def read(self, token_id: int, top: int) -> TokenLogprob:
        pairs = zip(self.step.ids[self.index], self.step.values[self.index], strict=True)
        return TokenLogprob(token_id, self.step.chosen[self.index], tuple(pairs)[:top])


class DecodeBatch:
    """Rows decoded together, one token a step.

    A step is launched before the tokens of the previous one are read. For a row that joins with
    ``p``, the last token of its prompt:

    1. The first :meth:`step` launches ``model(p)``, which draws ``t1``. It waits for ``t1`` and
       reports it, so that the first token is not delayed.
    2. The second launches ``model(t1)``, which draws ``t2``, and reports nothing.
    3. The third launches ``model(t2)``, with ``t2`` still being computed. Only then does it wait
       for ``t2`` and report it.
    4. Each further call launches ``t(n+1)`` and reports ``t(n)``. While the caller handles
       ``t(n)``, the device computes ``t(n+1)``.

    When the row leaves, the token that is being computed is dropped. A row that may come back keeps
    it: :meth:`settle` stores it in ``next_id``.

    Args:
        model: The model, with weights read.
        vocab_size: Number of token ids scored by the output layer.
        agree: Replaces drawn tokens with those that all ranks use.

    Attributes:
        rows: The rows in the order of their slots.
    """

    def __init__(self, model: Module, vocab_size: int, agree: Agree | None = None) -> None:
        self._model = model
        self._agree = agree
        self._vocab_size = vocab_size
        self.rows: list[Row] = []
        # A single row keeps its own caches, which need no mask.
        self._caches: Caches = []
        self._inputs = mx.array([], dtype=mx.uint32)
        # Whether the logits behind each input are finite.
        self._finite = mx.array([], dtype=mx.bool_)
        self._steps = 0
        self._prepare()

    def join(self, rows: Sequence[Row], expected: int = 0) -> None:
        """Add rows together with their caches.

        Args:
            rows: The rows to add.
            expected: Number of rows expected to join soon. A reallocation makes room for them.
        """
        if not rows:
            return
        brought = [row.caches for row in rows]
        capacity = len(self.rows) + len(rows) + expected
        if len(self.rows) > 1:
            extend(self._caches, brought, capacity)
        elif len(self.rows) + len(rows) == 1:
            (self._caches,) = brought
        else:
            self._caches = merge([self._caches, *brought] if self.rows else brought, capacity)
        for row in rows:
            row.caches = []
        ids = mx.array([row.next_id for row in rows], dtype=mx.uint32)
        finite = mx.array([row.is_finite for row in rows])
        self._inputs = mx.concatenate([self._inputs, ids]) if self.rows else ids
        self._finite = mx.concatenate([self._finite, finite]) if self.rows else finite
        self.rows = [*self.rows, *rows]
        self._prepare()

    def leave(self, rows: Sequence[Row]) -> None:
        """Remove rows without their caches."""
        leaving = {id(row) for row in rows}
        stay = _fill_gaps([id(row) not in leaving for row in self.rows])
        if len(stay) < len(self.rows):
            self._keep(stay)

    def leave_with_caches(self, row: Row) -> None:
        """Remove a row, and store a copy of the caches in the row."""
        row.caches = self._caches_of(self.rows.index(row))
        evaluate(row.caches)
        self.leave([row])

    def caches_of(self, row: Row) -> Caches:
        """Return the caches of a row, to be read before the batch changes."""
        if len(self.rows) == 1:
            return self._caches
        return view(self._caches, self.rows.index(row))

    @property
    def nbytes(self) -> int:
        """Bytes of the caches, in use or not."""
        return sum(int(cache.nbytes) for cache in self._caches)

    def compact(self) -> None:
        """Free the memory left by removed rows."""
        self.finish()
        compact(self._caches)

    def settle(self, row: Row) -> None:
        """Wait for a row's next input token, and store the id in the row before a preemption."""
        slot = self.rows.index(row)
        row.next_id = cast("int", self._inputs[slot].item())
        row.is_finite = cast("bool", self._finite[slot].item())

    def finish(self) -> None:
        """Wait for the step launched last."""
        mx.eval(self._inputs, self._finite)

    def step(self) -> list[Token | NotFinite]:
        """Launch the next step, then report the tokens of the previous one.

        A row that has just joined has no previous step: its first token is awaited and reported.
        """
        inputs, finite, rows = self._inputs, self._finite, self.rows
        logits = self._model(inputs[:, None], cache=self._caches)[:, -1, :]
        drawn = [row.drawn for row in rows]
        changed = self._penalties(logits, [row.tokens for row in rows], inputs, drawn)
        tokens = self._sampler(changed, drawn)
        self._set_inputs(tokens, are_finite(logits, tokens))
        logprobs = self._compute_logprobs(logits)
        mx.async_eval(
            self._inputs, self._finite, [part for found in logprobs for part in _arrays_of(found)]
        )
        self._steps += 1
        if self._steps % _STATE_STEPS == 0:
            mx.async_eval([cache.state for cache in self._caches])
        events = self._report(_read_drawn(inputs, finite), logprobs)
        first = [slot for slot, row in enumerate(rows) if row.drawn == 1 and row.is_unreported]
        if first:
            values = _read_drawn(self._inputs, self._finite)
            events += [self._event(rows[slot], *values[slot]) for slot in first]
        return events

    def _set_inputs(self, drawn: mx.array, finite: mx.array) -> None:
        """Make drawn tokens the next inputs. A row with non-finite logits gets token 0."""
        # NaN candidates may have ids outside the vocabulary.
        drawn = mx.where(finite, drawn, 0)
        if self._agree:
            agreed = self._agree(mx.concatenate([drawn, finite.astype(drawn.dtype)]))
            drawn, flags = mx.split(agreed, 2)
            finite = flags > 0
        self._inputs, self._finite = drawn, finite

    def _report(
        self, values: Sequence[tuple[int, bool]], logprobs: Sequence[_RowLogprobs | None]
    ) -> list[Token | NotFinite]:
        """Report the tokens just read, and advance every row by one token."""
        events = []
        for row, (value, is_finite), own in zip(self.rows, values, logprobs, strict=True):
            if row.is_unreported:
                events.append(self._event(row, value, is_finite))
            row.tokens.append(value)
            row.logprobs, row.is_unreported = own, True
            row.drawn += 1
        return events

    def _event(self, row: Row, value: int, is_finite: bool) -> Token | NotFinite:
        row.is_unreported = False
        if not is_finite:
            row.is_finite = False
            return NotFinite(row.id)
        if row.logprobs is None:
            return Token(row.id, value)
        return Token(row.id, value, row.logprobs.read(value, row.sampling.logprobs or 0))

    def _compute_logprobs(self, logits: mx.array) -> list[_RowLogprobs | None]:
        """Compute log probabilities of the drawn tokens, for rows with ``logprobs``."""
        found: list[_RowLogprobs | None] = [None] * len(self.rows)
        if not self._logprob_rows:
            return found
        selection = rows_of(self._logprob_rows, len(self.rows))
        tokens = self._inputs
        if selection is not None:
            logits, tokens = logits[selection], tokens[selection]
        step = _StepLogprobs(token_logprobs(logits, tokens, self._top))
        for index, slot in enumerate(self._logprob_rows):
            found[slot] = _RowLogprobs(step, index)
        return found

    def _caches_of(self, slot: int) -> Caches:
        return self._caches if len(self.rows) == 1 else extract(self._caches, slot)

    def _keep(self, slots: list[int]) -> None:
        if len(slots) == 1:
            self._caches = self._caches_of(slots[0])
        elif slots:
            # A pending step would keep MLX from writing to the memory in place.
            self.finish()
            keep(self._caches, slots)
        else:
            self._caches = []
        index = mx.array(slots, dtype=mx.int32)
        self._inputs, self._finite = self._inputs[index], self._finite[index]
        self.rows = [self.rows[slot] for slot in slots]
        self._prepare()

    def _prepare(self) -> None:
        """Prepare the sampler and the penalties for the present rows."""
        options = [row.sampling for row in self.rows]
        self._sampler = Sampler(options, self._vocab_size)
        self._penalties = Penalties(options)
        self._logprob_rows = [i for i, option in enumerate(options) if option.logprobs is not None]
        self._top = max((options[i].logprobs or 0 for i in self._logprob_rows), default=0)


def _read_drawn(inputs: mx.array, finite: mx.array) -> list[tuple[int, bool]]:
    """Wait for drawn tokens. Return each id with a flag for finite logits."""
    values, flags = cast("list[int]", inputs.tolist()), cast("list[bool]", finite.tolist())
    return list(zip(values, flags, strict=True))


def _arrays_of(found: _RowLogprobs | None) -> tuple[mx.array, ...]:
    if found is None:
        return ()
    arrays = found.step.arrays
    return arrays.chosen, arrays.ids, arrays.values


def _fill_gaps(stays: Sequence[bool]) -> list[int]:
    """Return the slots to keep, with the last ones filling gaps to move few rows.

    For example, if slot 1 of four leaves, the result is 0, 3, 2.
    """
    slots = [slot for slot, stay in enumerate(stays) if stay]
    return [slot if stays[slot] else slots.pop() for slot in range(len(slots))]
