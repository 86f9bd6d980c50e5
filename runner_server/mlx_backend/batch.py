"""The step loop on mlx_lm's models and caches: prompts in turns, rows together."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from itertools import islice

from mlx.nn.layers.base import Module

from runner_server.engine.prefill_policy import PrefillPolicy
from runner_server.engine.prefix_cache import PrefixCache
from runner_server.engine.types import MAX_PARALLEL, Event, Prefill, Sampling
from runner_server.mlx_backend.cache.row_caches import (
    CachePieces,
    Caches,
    Segment,
    StateSnapshot,
    prefill,
)
from runner_server.mlx_backend.decode import Agree, DecodeBatch, Row
from runner_server.mlx_backend.planning.plan import ROWS_TOGETHER
from runner_server.mlx_backend.stream_errors import recover

MlxPrefixCache = PrefixCache[Segment, StateSnapshot]

_WORTHWHILE = 32
"""Tokens from which on it pays to stop a prompt where it leaves an earlier one's."""


@dataclass(frozen=True)
class BatchBudget:
    """The memory that a batch may take beside the weights.

    Attributes:
        budget_bytes: The most for the caches of all rows.
        working_bytes: The most for what a chunk or a step takes meanwhile.
        row_bytes: The caches of one row of so many tokens.
        chunk_bytes: What evaluating so many tokens after so many others takes.
    """

    budget_bytes: float = math.inf
    working_bytes: float = math.inf
    row_bytes: Callable[[int], int] = field(default=lambda _: 0)
    chunk_bytes: Callable[[int, int], float] = field(default=lambda _tokens, _before: 0.0)

    def max_prompts_together(self, length: int, before: int) -> int:
        """How many prompts may be evaluated as one.

        Args:
            length: Tokens of each that are evaluated.
            before: Tokens of each that are evaluated already.
        """
        # Their caches are copied into a batch, grow there, and are copied out of it.
        copies = 3 * self.row_bytes(before + length)
        cost = self.chunk_bytes(length, before) + copies
        return int(min(MAX_PARALLEL, self.working_bytes / max(cost, 1)))


@dataclass(eq=False)
class _Prompt:
    """A row whose prompt is being evaluated, all but its last token.

    Attributes:
        row: Its tokens are those evaluated so far.
        ids: The whole prompt.
        cached: How many of them were taken from earlier prompts.
        branch: Where an earlier prompt goes another way, if a stop there is of use.
    """

    row: Row
    ids: Sequence[int]
    cached: int = 0
    branch: int | None = None

    @property
    def prefilled(self) -> int:
        return len(self.row.tokens)

    @property
    def remaining(self) -> int:
        return len(self.ids) - 1 - self.prefilled

    def lookahead(self) -> tuple[int, ...]:
        """Its next tokens, enough to tell whether another goes the same way."""
        return tuple(self.ids[self.prefilled : self.prefilled + _WORTHWHILE])

    def next_chunk(self, count: int) -> list[int]:
        """The next tokens to evaluate, at most so many, and none beyond the branch."""
        end = min(self.prefilled + count, len(self.ids) - 1)
        if self.branch is not None:
            end = min(end, self.branch)
        return list(self.ids[self.prefilled : end])

    def progress(self) -> Prefill:
        return Prefill(self.row.id, self.prefilled, len(self.ids), self.cached)


class MlxBatch:
    """Evaluates prompts in turns and decodes rows together.

    Args:
        model: The evaluated model.
        vocab_size: Token ids its output layer scores.
        max_chunk: Most tokens of a prompt that are evaluated at once.
        pieces: Cuts the caches of the model.
        prefix_cache: Prompts evaluated before; outlives the batch.
        clock: Seconds that pass.
        agree: See :class:`DecodeBatch`.
        budget: The memory that it may take; without limit if None.
    """

    def __init__(
        self,
        model: Module,
        vocab_size: int,
        max_chunk: int,
        pieces: CachePieces,
        prefix_cache: MlxPrefixCache,
        clock: Callable[[], float] = time.perf_counter,
        agree: Agree | None = None,
        budget: BatchBudget | None = None,
    ) -> None:
        self._model = model
        self._pieces = pieces
        self._prefix_cache = prefix_cache
        self._budget = budget or BatchBudget()
        self._clock = clock
        self._policy = PrefillPolicy(max_chunk)
        self._max_chunk = max_chunk
        # In order of arrival.
        self._prefilling: dict[int, _Prompt] = {}
        self._joining: list[Row] = []
        self._preempted: dict[int, Row] = {}
        self._decoding = DecodeBatch(model, vocab_size, agree)
        self._is_single_rank = agree is None
        self._decode_seconds = 0.0

    def add(self, row: int, prompt_ids: Sequence[int], sampling: Sampling) -> None:
        """Begins a row; see ``Batch.add``."""
        begun = Row(row, sampling, [], prompt_ids[-1], caches=self._pieces.new())
        self._prefilling[row] = _Prompt(begun, prompt_ids)

    def remove(self, rows: Collection[int]) -> None:
        """Ends rows and keeps what was evaluated for others; see ``Batch.remove``."""
        decoded = [row for row in self._decoding.rows if row.id in rows]
        for row in decoded if self._prefix_cache.is_enabled else ():
            # What is read of the caches waits for the step that was begun, too.
            self._decoding.settle(row)
            self._cache_prefix(row, self._decoding.caches_of(row))
        self._decoding.leave(decoded)
        ended = [row for row in self._joining if row.id in rows]
        self._joining = [row for row in self._joining if row.id not in rows]
        for id_ in rows:
            if prompt := self._prefilling.pop(id_, None):
                ended.append(prompt.row)
            if preempted := self._preempted.pop(id_, None):
                ended.append(preempted)
        for row in ended:
            self._cache_prefix(row, row.caches)

    def preempt(self, row: int) -> None:
        """Sets a row aside with what it holds; see ``Batch.preempt``."""
        (aside,) = (each for each in self._decoding.rows if each.id == row)
        self._decoding.settle(aside)
        self._decoding.leave_with_caches(aside)
        self._preempted[row] = aside
        self._compact_to_fit(0)

    def resume(self, row: int) -> None:
        """Takes a row in again; see ``Batch.resume``."""
        self._joining.append(self._preempted.pop(row))

    def step(self) -> list[Event]:
        """Evaluates prompts for a slice of time, then decodes; see ``Batch.step``."""
        try:
            return self._step()
        except Exception:
            # Among several ranks MLX might wait for those that do not make the step any more.
            if self._is_single_rank:
                recover()
            raise

    def _step(self) -> list[Event]:
        waited = self._finish_decoding()
        events: list[Event] = [*self._prefill()]
        self._decoding.join(self._joining, expected=self._expected_rows())
        self._joining = []
        if self._decoding.rows:
            began = self._clock()
            events += self._decoding.step()
            self._decode_seconds = waited + self._clock() - began
        return events

    def close(self) -> None:
        """Frees everything; see ``Batch.close``."""
        self._prefilling.clear()
        self._preempted.clear()
        self._joining.clear()
        self._decoding.leave(self._decoding.rows)

    def _finish_decoding(self) -> float:
        """Waits for the step that was begun, if prompts would wait for it anyway.

        Returns:
            How long: time of decoding that is not to be taken for the prompts'.
        """
        if not (self._prefilling and self._decoding.rows):
            return 0.0
        began = self._clock()
        self._decoding.finish()
        return self._clock() - began

    def _expected_rows(self) -> int:
        """Prompts that will be decoded after a chunk, as far as there is memory for them twice."""
        soon = sum(prompt.remaining <= self._max_chunk for prompt in self._prefilling.values())
        rows = [*self._decoding.rows, *self._joining]
        if not (soon and rows):
            return soon
        one = self._budget.row_bytes(1 + max(len(row.tokens) for row in rows))
        left = self._budget.budget_bytes - self._undecoded_bytes() - one * len(rows)
        return soon if left >= soon * one else max(0, int(left / one))

    def _undecoded_bytes(self) -> int:
        """Caches of rows that are not decoded: of prompts, and of rows set aside."""
        rows = (*(prompt.row for prompt in self._prefilling.values()), *self._preempted.values())
        return sum(self._budget.row_bytes(len(row.tokens)) for row in rows)

    def _compact_to_fit(self, more_bytes: int) -> None:
        """Gives back the memory of rows that have left the batch, if it is needed."""
        held = self._decoding.nbytes + self._undecoded_bytes() + more_bytes
        if held > self._budget.budget_bytes and self._decoding.rows:
            self._decoding.compact()

    # -- prompts -----------------------------------------------------------------

    def _prefill(self) -> list[Prefill]:
        """Evaluates chunks of prompts until the slice is over."""
        self._policy.begin_slice(
            self._decode_seconds, len(self._decoding.rows), len(self._prefilling)
        )
        events = []
        while choice := self._policy.next(self._remaining()):
            id_, count = choice
            prompt = self._prefilling[id_]
            if count:
                self._reuse(prompt)
            together = [prompt, *self._companions(prompt, count)]
            self._prefill_chunks(together, count)
            for each in together:
                events.append(each.progress())
                if not each.remaining:
                    self._joining.append(self._prefilling.pop(each.row.id).row)
        return events

    def _remaining(self) -> dict[int, int]:
        return {id_: prompt.remaining for id_, prompt in self._prefilling.items()}

    def _companions(self, prompt: _Prompt, count: int) -> list[_Prompt]:
        """Prompts that are evaluated to their ends beside one: the weights are read once for all.

        They stand where it stands and go different branches from there: what they share is
        better evaluated once.
        """
        length = prompt.remaining
        most = min(self._policy.token_capacity, ROWS_TOGETHER * self._max_chunk) // max(1, length)
        most = min(most, self._budget.max_prompts_together(length, prompt.prefilled))
        if length < 2 or count < length or prompt.branch is not None or most < 2:
            return []
        shortest = length // 2 if self._pieces.can_pad else length
        branches = {prompt.lookahead()}
        found: list[_Prompt] = []
        for other in islice(self._prefilling.values(), 2 * most):
            if other is prompt or len(found) + 1 == most:
                continue
            self._reuse(other)
            is_level = other.prefilled == prompt.prefilled and other.branch is None
            is_fit = is_level and shortest <= other.remaining <= length
            if is_fit and other.lookahead() not in branches:
                branches.add(other.lookahead())
                found.append(other)
        return found

    def _reuse(self, prompt: _Prompt) -> None:
        """Takes over what other prompts have evaluated by now, if that is more."""
        beginning = prompt.ids[:-1]
        match = self._prefix_cache.match(beginning)
        prompt.branch = None
        if match.usable > prompt.prefilled:
            count, segments, snapshot = self._prefix_cache.lookup(beginning)
            prompt.row.caches = self._pieces.restore(segments, snapshot or [])
            prompt.cached += count - prompt.prefilled
            prompt.row.tokens = list(prompt.ids[:count])
        # A later prompt that begins so far like this one can then begin there.
        gain = match.common - match.usable
        if self._pieces.needs_snapshot and gain >= _WORTHWHILE and match.common > prompt.prefilled:
            prompt.branch = match.common

    def _prefill_chunks(self, prompts: Sequence[_Prompt], count: int) -> None:
        """Evaluates the next tokens of prompts; of several, all."""
        chunks = [prompt.next_chunk(count) for prompt in prompts]
        total = sum(map(len, chunks))
        if not total:
            return
        before = prompts[0].prefilled
        self._compact_to_fit(len(prompts) * self._budget.row_bytes(before + max(map(len, chunks))))
        began = self._clock()
        caches = prefill(self._model, [prompt.row.caches for prompt in prompts], chunks)
        self._policy.record(total, self._clock() - began)
        for prompt, chunk, own in zip(prompts, chunks, caches, strict=True):
            prompt.row.caches = own
            prompt.row.tokens += chunk
            at_branch = prompt.prefilled == prompt.branch
            if at_branch or not prompt.remaining or not self._pieces.needs_snapshot:
                self._cache_prefix(prompt.row, prompt.row.caches)

    def _cache_prefix(self, row: Row, caches: Caches) -> None:
        """Keeps what a row has evaluated, and its caches hold, for prompts that begin like it."""
        if not (self._prefix_cache.is_enabled and row.tokens):
            return
        if not row.is_finite:
            # Ranks hold other parts of it, and must keep the same prompts.
            is_sound = self._pieces.is_finite if self._is_single_rank else _never
            self._prefix_cache.forget(row.tokens, is_sound)
            return
        snapshot = None
        if self._pieces.needs_snapshot:

            def snapshot() -> StateSnapshot:
                return self._pieces.snapshot(caches)

        self._prefix_cache.insert(
            row.tokens,
            lambda start, end: self._pieces.segment(caches, start, end),
            snapshot,
            token_bytes=self._pieces.token_bytes(caches),
        )


def _never(_segment: Segment, _snapshot: StateSnapshot | None) -> bool:
    return False
