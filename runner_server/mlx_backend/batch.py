"""The step of a batch on mlx_lm's models and caches: prefill of prompts, then decode of rows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from itertools import islice

from mlx.nn.layers.base import Module

from runner_common.contract import MAX_PARALLEL
from runner_server.engine.prefill_policy import PrefillPolicy
from runner_server.engine.prefix_cache import PrefixCache
from runner_server.engine.types import Event, Prefill, Sampling
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
"""Fewest tokens worth a stop at the branch from an earlier prompt, for a snapshot there."""


@dataclass(frozen=True)
class BatchBudget:
    """Memory of a batch beside the weights.

    Attributes:
        budget_bytes: The most for the caches of all rows.
        working_bytes: The most for the working memory of a chunk or a step.
        row_bytes: Bytes of the caches of one row, by its tokens.
        chunk_bytes: Bytes of working memory of a chunk, by its tokens and the tokens before.
    """

    budget_bytes: float = math.inf
    working_bytes: float = math.inf
    row_bytes: Callable[[int], int] = field(default=lambda _: 0)
    chunk_bytes: Callable[[int, int], float] = field(default=lambda _tokens, _before: 0.0)

    def max_prompts_together(self, length: int, before: int) -> int:
        """Return the most prompts to prefill in one call.

        Args:
            length: Tokens to prefill of each.
            before: Tokens of each that are prefilled already.
        """
        # The caches are copied into a batch, grow there, and are copied out again.
        copies = 3 * self.row_bytes(before + length)
        cost = self.chunk_bytes(length, before) + copies
        return int(min(MAX_PARALLEL, self.working_bytes / max(cost, 1)))


@dataclass(eq=False)
class _Prompt:
    """A row in prefill; the last token of the prompt is left to the first decode step.

    Attributes:
        row: The row, whose ``tokens`` are the prefilled ones.
        ids: The whole prompt.
        cached: Tokens taken from the prefix cache.
        branch: Position at which an earlier prompt diverges, if a snapshot there is useful.
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
        """Return enough of the next tokens to compare with another prompt."""
        return tuple(self.ids[self.prefilled : self.prefilled + _WORTHWHILE])

    def next_chunk(self, count: int) -> list[int]:
        """Return at most ``count`` next tokens, and none beyond the branch."""
        end = min(self.prefilled + count, len(self.ids) - 1)
        if self.branch is not None:
            end = min(end, self.branch)
        return list(self.ids[self.prefilled : end])

    def progress(self) -> Prefill:
        return Prefill(self.row.id, self.prefilled, len(self.ids), self.cached)


class MlxBatch:
    """Prefills prompts in chunks and decodes rows together.

    Args:
        model: The model, with its weights in memory.
        vocab_size: Token ids that the output layer scores.
        max_chunk: Most prompt tokens in one call.
        pieces: Segments and snapshots of the model's caches.
        prefix_cache: Prefilled prompts; outlives the batch.
        clock: A monotonic clock in seconds.
        agree: See :class:`DecodeBatch`.
        budget: The memory of the batch; None = unlimited.
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
        """Add a row; see ``Batch.add``."""
        begun = Row(row, sampling, [], prompt_ids[-1], caches=self._pieces.new())
        self._prefilling[row] = _Prompt(begun, prompt_ids)

    def remove(self, rows: Collection[int]) -> None:
        """Remove rows and cache their prefixes; see ``Batch.remove``."""
        decoded = [row for row in self._decoding.rows if row.id in rows]
        for row in decoded if self._prefix_cache.is_enabled else ():
            # Reading the caches waits for the step under way anyway.
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
        """Take a row out with its caches; see ``Batch.preempt``."""
        (aside,) = (each for each in self._decoding.rows if each.id == row)
        self._decoding.settle(aside)
        self._decoding.leave_with_caches(aside)
        self._preempted[row] = aside
        self._compact_to_fit(0)

    def resume(self, row: int) -> None:
        """Let a preempted row join again; see ``Batch.resume``."""
        self._joining.append(self._preempted.pop(row))

    def step(self) -> list[Event]:
        """Prefill for a slice of time, then decode; see ``Batch.step``."""
        try:
            return self._step()
        except Exception:
            # With several ranks, MLX might wait for ranks that do not make the step.
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
        """Free everything; see ``Batch.close``."""
        self._prefilling.clear()
        self._preempted.clear()
        self._joining.clear()
        self._decoding.leave(self._decoding.rows)

    def _finish_decoding(self) -> float:
        """Wait for the decode step under way, if prefill would wait anyway.

        Returns:
            The seconds waited, which count as decoding and not as prefill.
        """
        if not (self._prefilling and self._decoding.rows):
            return 0.0
        began = self._clock()
        self._decoding.finish()
        return self._clock() - began

    def _expected_rows(self) -> int:
        """Return how many prompts end with their next chunk, limited by memory for two copies."""
        soon = sum(prompt.remaining <= self._max_chunk for prompt in self._prefilling.values())
        rows = [*self._decoding.rows, *self._joining]
        if not (soon and rows):
            return soon
        one = self._budget.row_bytes(1 + max(len(row.tokens) for row in rows))
        left = self._budget.budget_bytes - self._undecoded_bytes() - one * len(rows)
        return soon if left >= soon * one else max(0, int(left / one))

    def _undecoded_bytes(self) -> int:
        """Return the bytes of caches outside the decode batch: of prompts and preempted rows."""
        rows = (*(prompt.row for prompt in self._prefilling.values()), *self._preempted.values())
        return sum(self._budget.row_bytes(len(row.tokens)) for row in rows)

    def _compact_to_fit(self, more_bytes: int) -> None:
        """Compact the decode batch if ``more_bytes`` would exceed the budget."""
        held = self._decoding.nbytes + self._undecoded_bytes() + more_bytes
        if held > self._budget.budget_bytes and self._decoding.rows:
            self._decoding.compact()

    # -- prompts -----------------------------------------------------------------

    def _prefill(self) -> list[Prefill]:
        """Prefill chunks of prompts until the slice is over."""
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
        """Return further prompts to prefill in the same call, which reads the weights once.

        Each is at the same position as ``prompt`` and is prefilled to its end. Prompts that
        continue alike are left out: their common tokens are cheaper to prefill once.
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
        """Restore the caches of a longer prefix from the prefix cache, if there is one by now."""
        beginning = prompt.ids[:-1]
        match = self._prefix_cache.match(beginning)
        prompt.branch = None
        if match.usable > prompt.prefilled:
            count, segments, snapshot = self._prefix_cache.lookup(beginning)
            prompt.row.caches = self._pieces.restore(segments, snapshot or [])
            prompt.cached += count - prompt.prefilled
            prompt.row.tokens = list(prompt.ids[:count])
        # A later prompt with the same prefix can then reuse the snapshot at its end.
        gain = match.common - match.usable
        if self._pieces.needs_snapshot and gain >= _WORTHWHILE and match.common > prompt.prefilled:
            prompt.branch = match.common

    def _prefill_chunks(self, prompts: Sequence[_Prompt], count: int) -> None:
        """Prefill the next tokens of a prompt, or the rest of several prompts."""
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
        """Insert the tokens and caches of a row into the prefix cache."""
        if not (self._prefix_cache.is_enabled and row.tokens):
            return
        if not row.is_finite:
            # Each rank sees a part of the values, and all must keep the same prompts.
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
