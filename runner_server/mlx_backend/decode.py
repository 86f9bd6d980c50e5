"""The decode step, which computes the next token of each row of a batch.

:meth:`DecodeBatch.step` launches a step before it collects the previous one, so that the device
always has work. The inputs of a step are arrays that the step in flight is still computing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx
from mlx.nn.layers.base import Module

from runner_server.engine.types import (
    CachePolicy,
    Failure,
    NoLegalToken,
    NotFinite,
    Sampling,
    Token,
)
from runner_server.mlx_backend.adapters.selection import BASE, Selection
from runner_server.mlx_backend.cache.row_caches import (
    Caches,
    compact,
    cut_back,
    evaluate,
    extend,
    extract,
    keep,
    merge,
    view,
)
from runner_server.mlx_backend.constraints.matcher import GrammarMatcher, RowMatcher
from runner_server.mlx_backend.drawing import Agree, Drawing
from runner_server.mlx_backend.in_flight import InFlightStep
from runner_server.mlx_backend.sampling.constrained import ConstrainedSampler
from runner_server.mlx_backend.sampling.mask_rows import MaskRows
from runner_server.mlx_backend.sampling.row_logprobs import RowLogprobs
from runner_server.mlx_backend.sampling.sampler import Sampler
from runner_server.mlx_backend.speculation.draft_drawing import DraftDrawing, matchers_of_draft

_STATE_STEPS = 64
"""Number of steps after which the state of all caches is evaluated. If nothing reads a layer's
offset, its unevaluated graph would otherwise grow by one addition per step."""


@dataclass(frozen=True)
class CheckedDraft:
    """Result of a step with a draft.

    Attributes:
        events: The tokens of the row.
        drafted: Number of drafted tokens checked.
    """

    events: list[Token | Failure]
    drafted: int


@dataclass(eq=False)
class Row:
    """A row of the batch, also during prefill and preemption.

    Attributes:
        id: The engine's id of the row.
        sampling: The sampling options.
        prompt_ids: The whole prompt. Its last token is the input of the first decode step.
        matcher: Limits the tokens that may be drawn; None without a constraint. Consumes each token
            when it is reported.
        next_id: The input of the row's next step, valid while the row is not in the batch.
        cache_policy: Use of the prefix cache.
        tokens: The tokens that have passed through the model.
        is_unreported: Whether the input of the next step was drawn but is not reported yet.
        drawn: Number of tokens drawn.
        caches: The row's caches while it is not in the batch.
        logprobs: Log probabilities of the input of the next step, if requested.
        is_finite: Whether the logits of every token read so far are finite.
        adapter: Number of the row's adapter.
    """

    id: int
    sampling: Sampling
    prompt_ids: Sequence[int]
    next_id: int
    cache_policy: CachePolicy
    matcher: RowMatcher | None = None
    tokens: list[int] = field(default_factory=list)
    is_unreported: bool = False
    drawn: int = 0
    caches: Caches = field(default_factory=list)
    logprobs: RowLogprobs | None = None
    is_finite: bool = True
    adapter: int = BASE


class DecodeBatch:
    """Rows decoded together, one token per step.

    Between two calls, one step is in flight: :meth:`step` launches the next one with the tokens in
    flight as inputs, and then collects those tokens. For a row that joins with ``p``, the last
    token of its prompt:

    1. The first :meth:`step` launches ``model(p)``, which draws ``t1``. It waits for ``t1`` and
       reports it, so that the first token is not delayed.
    2. The second launches ``model(t1)``, which draws ``t2``, and reports nothing.
    3. The third launches ``model(t2)``, with ``t2`` still in flight. Only then does it collect
       ``t2`` and report it.
    4. Each further call launches ``t(n+1)`` and collects ``t(n)``. While the caller handles
       ``t(n)``, the device computes ``t(n+1)``.

    When the row leaves, the token in flight is dropped, unless :meth:`settle` has stored it in
    ``next_id`` for a row that will join again.

    Args:
        model: The model, with weights read.
        vocab_size: Number of token ids scored by the output layer.
        agree: Replaces drawn tokens with those of rank 0; None if there is one rank.
        selection: The adapter of each row of a call of the model.

    Attributes:
        rows: The rows in the order of their slots.
    """

    def __init__(
        self,
        model: Module,
        vocab_size: int,
        agree: Agree | None = None,
        selection: Selection | None = None,
    ) -> None:
        self._model = model
        self._selection = selection or Selection()
        self._agree = agree
        self._vocab_size = vocab_size
        self._mask_rows = MaskRows(vocab_size)
        self.rows: list[Row] = []
        # A single row stays in its own caches, which need no mask; several are merged.
        self._caches: Caches = []
        self._in_flight = _inputs_of([])
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
        known = _inputs_of(rows)
        self._in_flight = self._in_flight.followed_by(known) if self.rows else known
        self.rows = [*self.rows, *rows]
        self._prepare()

    def leave(self, rows: Sequence[Row]) -> None:
        """Remove rows and free their caches."""
        leaving = {id(row) for row in rows}
        stay = _fill_gaps([id(row) not in leaving for row in self.rows])
        if len(stay) < len(self.rows):
            self._keep(stay)

    def leave_with_caches(self, row: Row) -> None:
        """Remove a row, storing a copy of its caches in ``row.caches``."""
        row.caches = self._caches_of(self.rows.index(row))
        evaluate(row.caches)
        self.leave([row])

    def caches_of(self, row: Row) -> Caches:
        """Return the caches of a row, valid until the batch changes."""
        if len(self.rows) == 1:
            return self._caches
        return view(self._caches, self.rows.index(row))

    @property
    def nbytes(self) -> int:
        """Bytes allocated for the caches, in use or not."""
        return sum(int(cache.nbytes) for cache in self._caches)

    def compact(self) -> None:
        """Free the memory left unused by removed rows."""
        self.finish()
        compact(self._caches)

    def settle(self, row: Row) -> None:
        """Wait for a row's token in flight, and store the id in ``row.next_id``."""
        slot = self.rows.index(row)
        row.next_id, row.is_finite = self._in_flight.kept([slot]).read()[0]

    def finish(self) -> None:
        """Wait for the step in flight."""
        self._in_flight.wait()

    @property
    def token_in_flight(self) -> int:
        """The token of the only row that follows ``row.tokens``. Waits for it."""
        ((value, _),) = self._in_flight.read()
        return value

    def step(self) -> list[Token | Failure]:
        """Launch the next step, then collect the tokens of the previous one.

        A row that has just joined has no previous step, so its first token is awaited at once. With
        constrained rows, the tokens of the previous step are collected before the next ones are
        drawn, because the masks depend on them, while the device already runs the model.

        Returns:
            At most one event for each row, in the order of the slots except for first tokens, which
            come last.
        """
        previous = self._in_flight
        logits = self._logits(previous.tokens[:, None])[:, -1, :]
        if self._is_constrained:
            mx.async_eval(previous.tokens, previous.finite)
            mx.async_eval(logits)
            events = self._report(previous)
            self._in_flight, logprobs = self._draw(logits, previous.tokens)
        else:
            self._in_flight, logprobs = self._draw(logits, previous.tokens)
            events = self._report(previous)
        self._advance(previous, logprobs)
        return [*events, *self._report_first()]

    def check(self, draft: Sequence[int]) -> CheckedDraft | None:
        """Check a draft of the only row's next tokens in one call of the model.

        The model is called with the last token and the draft, and a token is drawn after each of
        them, as steps would have drawn it. The tokens are reported up to the first one that differs
        from the draft, and the caches are cut back to these. Nothing is in flight afterwards.

        For example, with ``t1`` reported and ``t2`` in flight, and a draft of ``t2 a b``: the call
        ``model(t2, a, b)`` draws ``a c d``. The step reports ``t2``, ``a`` and ``c``, the caches
        keep ``t2`` and ``a``, and ``c`` is the next input.

        Args:
            draft: The tokens to expect after those reported.

        Returns:
            None if the token in flight differs from the draft, if the row's constraint excludes the
            draft, or if a number is not finite, which may be due to a wrong token of the draft.
            Nothing has changed then.
        """
        (row,) = self.rows
        previous = self._in_flight
        ((value, is_finite),) = previous.read()
        draft, matchers = _checkable(row, value, draft)
        if not (draft and is_finite):
            return None
        ids = [value, *draft]
        logits = self._logits(mx.array([ids], dtype=mx.uint32))[0]
        step, logprobs = self._draft_drawing(logits, row.tokens, ids, row.drawn, matchers)
        drawn = step.read()
        if not all(is_finite for _, is_finite in drawn) or any(each.failure for each in matchers):
            cut_back(self._caches, len(ids))
            return None
        accepted = 0
        while accepted < len(draft) and drawn[accepted] == (draft[accepted], True):
            accepted += 1
        cut_back(self._caches, len(draft) - accepted)
        events = self._report(previous)
        for index in range(accepted + 1):
            row.tokens.append(ids[index])
            row.drawn += 1
            row.logprobs = logprobs[index]
            events.append(self._event(row, *drawn[index], is_drafted=index < accepted))
        self._in_flight = InFlightStep.known([drawn[accepted][0]], [True])
        return CheckedDraft(events, len(draft))

    def _logits(self, tokens: mx.array) -> mx.array:
        """Return the logits after each of some tokens of all rows (rows x tokens x vocabulary)."""
        with self._selection.of([row.adapter for row in self.rows]):
            logits: mx.array = self._model(tokens, cache=self._caches)
        return logits

    def _draw(
        self, logits: mx.array, inputs: mx.array
    ) -> tuple[InFlightStep, list[RowLogprobs | None]]:
        """Launch the drawing of the next tokens, and the log probabilities of each row's token."""
        histories, drawn = [row.tokens for row in self.rows], [row.drawn for row in self.rows]
        step, logprobs = self._drawing(logits, histories, inputs, drawn)
        self._steps += 1
        if self._steps % _STATE_STEPS == 0:
            mx.async_eval([cache.state for cache in self._caches])
        return step, logprobs

    def _report(self, step: InFlightStep) -> list[Token | Failure]:
        """Wait for the tokens of the step before the one in flight; report those unreported."""
        read = zip(self.rows, step.read(), strict=True)
        return [self._event(row, *value) for row, value in read if row.is_unreported]

    def _advance(self, step: InFlightStep, logprobs: Sequence[RowLogprobs | None]) -> None:
        """Advance every row by one token.

        Args:
            step: The step before the one in flight.
            logprobs: Log probabilities of the tokens in flight.
        """
        for row, (value, _), own in zip(self.rows, step.read(), logprobs, strict=True):
            row.tokens.append(value)
            row.logprobs, row.is_unreported = own, True
            row.drawn += 1

    def _report_first(self) -> list[Token | Failure]:
        """Report the first tokens of rows, waiting for the step in flight if there are any."""
        rows = enumerate(self.rows)
        first = [slot for slot, row in rows if row.drawn == 1 and row.is_unreported]
        if not first:
            return []
        values = self._in_flight.read()
        return [self._event(self.rows[slot], *values[slot]) for slot in first]

    def _event(
        self, row: Row, value: int, is_finite: bool, *, is_drafted: bool = False
    ) -> Token | Failure:
        row.is_unreported = False
        if not is_finite:
            row.is_finite = False
            return NotFinite(row.id)
        if row.matcher:
            # Of the mask that the token was drawn with.
            if failure := row.matcher.failure:
                return NoLegalToken(row.id, failure)
            row.matcher.consume(value)
        logprob = row.logprobs.read(value) if row.logprobs else None
        return Token(row.id, value, logprob, is_drafted)

    def _caches_of(self, slot: int) -> Caches:
        return self._caches if len(self.rows) == 1 else extract(self._caches, slot)

    def _keep(self, slots: list[int]) -> None:
        if len(slots) == 1:
            self._caches = self._caches_of(slots[0])
        elif slots:
            # While a step is pending, MLX would copy the memory instead of writing in place.
            self.finish()
            keep(self._caches, slots)
        else:
            self._caches = []
        self._in_flight = self._in_flight.kept(slots)
        self.rows = [self.rows[slot] for slot in slots]
        self._prepare()

    def _prepare(self) -> None:
        """Rebuild the sampler, the penalties and the masks for the current rows."""
        options = [row.sampling for row in self.rows]
        matchers = [row.matcher for row in self.rows]
        self._is_constrained = any(matchers)
        sampler: Sampler | ConstrainedSampler
        if self._is_constrained:
            sampler = ConstrainedSampler(options, matchers, self._vocab_size, self._mask_rows)
        else:
            self._mask_rows.clear()
            sampler = Sampler(options, self._vocab_size)
        self._drawing = Drawing(options, sampler, self._agree)
        if len(options) == 1:
            (own,) = options
            self._draft_drawing = DraftDrawing(own, self._vocab_size, self._mask_rows, self._agree)


def _inputs_of(rows: Sequence[Row]) -> InFlightStep:
    """Return the inputs of the next step for rows that join."""
    return InFlightStep.known([row.next_id for row in rows], [row.is_finite for row in rows])


def _checkable(
    row: Row, value: int, draft: Sequence[int]
) -> tuple[Sequence[int], Sequence[GrammarMatcher]]:
    """Return the tokens of a draft after the token in flight, as far as the constraint allows them.

    Args:
        row: The row.
        value: The token in flight.
        draft: The tokens to expect after those reported.

    Returns:
        The tokens, none if the token in flight differs, and the matchers of ``DraftDrawing``.
    """
    if row.is_unreported:
        draft = draft[1:] if value == draft[0] else ()
    if row.matcher is None:
        return draft, ()
    matchers = matchers_of_draft(row.matcher, [value] if row.is_unreported else [], draft)
    return draft[: max(0, len(matchers) - 1)], matchers


def _fill_gaps(stays: Sequence[bool]) -> list[int]:
    """Return the slots to keep, in an order that moves few rows: the last ones fill the gaps.

    For example, if slot 1 of four leaves, the result is 0, 3, 2.
    """
    slots = [slot for slot, stay in enumerate(stays) if stay]
    return [slot if stays[slot] else slots.pop() for slot in range(len(slots))]
