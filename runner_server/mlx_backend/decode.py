"""The decode step: rows whose next tokens are computed together.

A step is begun before the tokens of the one before are read, so that the device
always has work: :meth:`DecodeBatch.step` puts the tokens that are still being computed
into the model, and only then waits for them.
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
"""Steps after which all of the caches' state is computed: where nothing uses a layer's
offset, what it is to be would grow by one more addition with each step."""


Agree = Callable[[mx.array], mx.array]


@dataclass(eq=False)
class Row:
    """A row, while it is decoded and while it is not.

    Attributes:
        id: The engine's name for it.
        sampling: How its tokens are drawn.
        tokens: Those that the model has been given.
        next_id: The one it is given next, if that is known.
        is_unreported: Whether that one was generated and has not been reported.
        drawn: How many tokens were drawn.
        caches: Its caches while it is not decoded.
        logprobs: How likely the next one was.
        is_finite: Whether the logits that the next one was drawn from are numbers, as far as
            that was read.
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
    """The token_logprobs of a step, read once for all rows.

    A part of an array would have to be computed, behind the step that was begun since.
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
    """Where the likelihood of a row's token stands."""

    step: _StepLogprobs
    index: int

    def read(self, token_id: int, top: int) -> TokenLogprob:
        pairs = zip(self.step.ids[self.index], self.step.values[self.index], strict=True)
        return TokenLogprob(token_id, self.step.chosen[self.index], tuple(pairs)[:top])


class DecodeBatch:
    """Rows that are decoded together.

    Args:
        model: The evaluated model.
        vocab_size: Token ids its output layer scores.
        agree: Puts in place of drawn tokens those that all ranks are to take.

    Attributes:
        rows: In the order in which they stand in the batch.
    """

    def __init__(self, model: Module, vocab_size: int, agree: Agree | None = None) -> None:
        self._model = model
        self._agree = agree
        self._vocab_size = vocab_size
        self.rows: list[Row] = []
        # A single row keeps caches of its own kind, which need no mask.
        self._caches: Caches = []
        self._inputs = mx.array([], dtype=mx.uint32)
        # Of the logits that each of them was drawn from.
        self._finite = mx.array([], dtype=mx.bool_)
        self._steps = 0
        self._prepare()

    def join(self, rows: Sequence[Row], expected: int = 0) -> None:
        """Adds rows with the caches they bring.

        Args:
            rows: To be decoded from now on.
            expected: Rows to come: where memory is taken for these, it is taken for those too.
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
        """Takes rows out, without their caches."""
        leaving = {id(row) for row in rows}
        stay = _fill_gaps([id(row) not in leaving for row in self.rows])
        if len(stay) < len(self.rows):
            self._keep(stay)

    def leave_with_caches(self, row: Row) -> None:
        """Takes a row out with a copy of its caches."""
        row.caches = self._caches_of(self.rows.index(row))
        evaluate(row.caches)
        self.leave([row])

    def caches_of(self, row: Row) -> Caches:
        """The caches of a row, to be read before the batch changes."""
        if len(self.rows) == 1:
            return self._caches
        return view(self._caches, self.rows.index(row))

    @property
    def nbytes(self) -> int:
        """Bytes of all caches, whether in use or not."""
        return sum(int(cache.nbytes) for cache in self._caches)

    def compact(self) -> None:
        """Gives back the memory of rows that have left."""
        self.finish()
        compact(self._caches)

    def settle(self, row: Row) -> None:
        """Waits for the token that a row was given last, so that it can be left alone."""
        slot = self.rows.index(row)
        row.next_id = cast("int", self._inputs[slot].item())
        row.is_finite = cast("bool", self._finite[slot].item())

    def finish(self) -> None:
        """Waits for the step that was begun last."""
        mx.eval(self._inputs, self._finite)

    def step(self) -> list[Token | NotFinite]:
        """Begins the next token of every row and reports those that were begun before.

        A row that has just joined has none of those; its first token is waited for.
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
        """Makes drawn tokens the next inputs; a row without numbers is given token 0."""
        # Candidates that are NaN may have ids that the model does not have.
        drawn = mx.where(finite, drawn, 0)
        if self._agree:
            agreed = self._agree(mx.concatenate([drawn, finite.astype(drawn.dtype)]))
            drawn, flags = mx.split(agreed, 2)
            finite = flags > 0
        self._inputs, self._finite = drawn, finite

    def _report(
        self, values: Sequence[tuple[int, bool]], logprobs: Sequence[_RowLogprobs | None]
    ) -> list[Token | NotFinite]:
        """Tells what the tokens given to the model were, and turns to the next ones."""
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
        """How likely the tokens just drawn are, for the rows that want to know."""
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
            # What is being computed would keep rows from being written in place.
            self.finish()
            keep(self._caches, slots)
        else:
            self._caches = []
        index = mx.array(slots, dtype=mx.int32)
        self._inputs, self._finite = self._inputs[index], self._finite[index]
        self.rows = [self.rows[slot] for slot in slots]
        self._prepare()

    def _prepare(self) -> None:
        """Prepares what depends on which rows there are."""
        options = [row.sampling for row in self.rows]
        self._sampler = Sampler(options, self._vocab_size)
        self._penalties = Penalties(options)
        self._logprob_rows = [i for i, option in enumerate(options) if option.logprobs is not None]
        self._top = max((options[i].logprobs or 0 for i in self._logprob_rows), default=0)


def _read_drawn(inputs: mx.array, finite: mx.array) -> list[tuple[int, bool]]:
    """Waits for drawn tokens, and whether there were numbers to draw them from."""
    values, flags = cast("list[int]", inputs.tolist()), cast("list[bool]", finite.tolist())
    return list(zip(values, flags, strict=True))


def _arrays_of(found: _RowLogprobs | None) -> tuple[mx.array, ...]:
    if found is None:
        return ()
    arrays = found.step.arrays
    return arrays.chosen, arrays.ids, arrays.values


def _fill_gaps(stays: Sequence[bool]) -> list[int]:
    """The places that stay, the last ones where others leave: as few as can be change place."""
    slots = [slot for slot, stay in enumerate(stays) if stay]
    return [slot if stays[slot] else slots.pop() for slot in range(len(slots))]
