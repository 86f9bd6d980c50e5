"""Execution of the scheduler's work items on mlx_lm's models and caches."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import assert_never, cast

import mlx.core as mx
from mlx.nn.layers.base import Module

from runner_server.engine.backend import Matcher
from runner_server.engine.prefix_cache import Match, PrefixCache
from runner_server.engine.prefix_disk import DiskTier
from runner_server.engine.types import CachePolicy, NotFinite, Sampling
from runner_server.engine.work import (
    DecodeItem,
    DraftPrefillItem,
    EmbedItem,
    PrefillItem,
    PromoteItem,
    PromptChunk,
    TextChunk,
    WorkItem,
    WorkReport,
)
from runner_server.mlx_backend.adapters.selection import NO_ADAPTERS, Attached
from runner_server.mlx_backend.batch_budget import BatchBudget
from runner_server.mlx_backend.cache.row_caches import (
    CachePieces,
    Caches,
    Segment,
    StateSnapshot,
    prefill,
)
from runner_server.mlx_backend.constraints.matcher import RowMatcher
from runner_server.mlx_backend.decode import DecodeBatch, Row
from runner_server.mlx_backend.drawing import Agree
from runner_server.mlx_backend.embedding.texts import TextModel, TextRows
from runner_server.mlx_backend.sampling.prompt_logprobs import ChunkLogprobs
from runner_server.mlx_backend.speculation.proposer import DraftModel, Proposer
from runner_server.mlx_backend.stream_errors import recover

MlxPrefixCache = PrefixCache[Segment, StateSnapshot]
MlxDiskTier = DiskTier[Segment, StateSnapshot]

_DISK_WAIT_SECONDS = 0.002
"""Longest wait for a block from disk in one work item, about a decode step of a small model."""

_LOGITS_ARRAYS = 3
"""Arrays of the size of a step's logits that a step frees and the next one could use again."""

_FEW_BYTES = 1 << 20
"""Buffers whose allocation takes no time worth saving."""


class MlxExecutor:
    """Implements ``runner_server.engine.backend.Executor`` for one batch of a model.

    Args:
        model: The model, with its weights in memory.
        vocab_size: Number of token ids that the output layer scores.
        pieces: Cuts and joins the model's caches for the prefix cache.
        prefix_cache: The prefix cache, which outlives the executor.
        clock: Returns monotonic seconds.
        agree: See :class:`DecodeBatch`; None if there is one rank.
        budget: The memory of the batch; None = unlimited.
        disk: The prefix cache on disk; None without one.
        texts: Computes vectors of texts; None for a model that does not embed.
        adapters: The model's adapters.
        draft_model: Proposes tokens; None without one.
    """

    def __init__(
        self,
        model: Module,
        vocab_size: int,
        pieces: CachePieces,
        prefix_cache: MlxPrefixCache,
        clock: Callable[[], float] = time.perf_counter,
        agree: Agree | None = None,
        budget: BatchBudget | None = None,
        disk: MlxDiskTier | None = None,
        texts: TextModel | None = None,
        adapters: Attached = NO_ADAPTERS,
        draft_model: DraftModel | None = None,
    ) -> None:
        self._model = model
        self._adapters = adapters
        self._vocab_size = vocab_size
        self._pieces = pieces
        self._prefix_cache = prefix_cache
        self._disk = disk
        self._budget = budget or BatchBudget()
        self._clock = clock
        # Rows with separate caches: in prefill, prefilled, or preempted.
        self._outside: dict[int, Row] = {}
        self._decoding = DecodeBatch(model, vocab_size, agree, adapters.selection)
        self._agree = agree
        self._texts = TextRows(texts) if texts else None
        self._proposer = Proposer(draft_model, vocab_size) if draft_model else None

    def add(
        self,
        row: int,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        cache_policy: CachePolicy,
        matcher: Matcher | None = None,
        adapter: str = "",
    ) -> None:
        """Add a row; see ``Executor.add``."""
        self._outside[row] = Row(
            row,
            sampling,
            prompt_ids,
            prompt_ids[-1],
            cache_policy,
            cast("RowMatcher | None", matcher),
            caches=self._pieces.new(),
            adapter=self._adapters.number(adapter),
        )

    def add_texts(self, row: int, texts: Sequence[Sequence[int]]) -> None:
        """Add texts to embed; see ``Executor.add_texts``."""
        self._require_texts().add(row, texts)

    def find_prefix(self, prompt_ids: Sequence[int], salt: str) -> Match:
        """Look a prompt up in the prefix cache; see ``Executor.find_prefix``."""
        return self._prefix_cache.match(prompt_ids, salt)

    def find_on_disk(self, prompt_ids: Sequence[int], salt: str) -> int:
        """Look a prompt up on disk; see ``Executor.find_on_disk``."""
        return self._disk.find(prompt_ids, salt) if self._disk else 0

    def run(self, item: WorkItem) -> WorkReport:
        """Run a work item; see ``Executor.run``."""
        try:
            match item:
                case PrefillItem(chunks):
                    return self._prefill(chunks)
                case DecodeItem():
                    return self._decode(item)
                case DraftPrefillItem():
                    return self._prefill_draft_model(item)
                case PromoteItem(row):
                    return self._promote(self._outside[row])
                case EmbedItem(chunks):
                    return self._embed(chunks)
                case _:
                    assert_never(item)
        except Exception:
            # Not with several ranks: MLX might wait for a rank that does not make this step.
            if self._agree is None:
                recover()
            raise

    def preempt(self, row: int) -> None:
        """Take a row out of the batch with its caches; see ``Executor.preempt``."""
        (leaving,) = (each for each in self._decoding.rows if each.id == row)
        self._decoding.settle(leaving)
        self._decoding.leave_with_caches(leaving)
        self._outside[row] = leaving
        self._compact_to_fit(0)

    def remove(self, rows: Collection[int]) -> None:
        """Remove rows, inserting their tokens into the prefix cache; see ``Executor.remove``."""
        decoded = [row for row in self._decoding.rows if row.id in rows]
        for row in filter(self._is_cached, decoded):
            # Costs nothing: reading the caches waits for the step in flight anyway.
            self._decoding.settle(row)
            self._cache_prefix(row, self._decoding.caches_of(row))
        self._decoding.leave(decoded)
        for row in [self._outside.pop(id_) for id_ in rows if id_ in self._outside]:
            self._cache_prefix(row, row.caches)
        if self._disk:
            for id_ in rows:
                self._disk.end(id_)
        if self._texts:
            self._texts.remove(rows)
        if self._proposer:
            self._proposer.drop(rows)

    def close(self) -> None:
        """Free everything; see ``Executor.close``."""
        self._outside.clear()
        self._decoding.leave(self._decoding.rows)
        self._texts = self._proposer = None

    # -- decode ------------------------------------------------------------------

    def _decode(self, item: DecodeItem) -> WorkReport:
        rows = [self._outside.pop(id_) for id_ in item.joining]
        if rows:
            self._make_room_for_buffers(len(self._decoding.rows) + len(rows))
        self._decoding.join(rows, expected=self._affordable(rows, item.expected))
        began = self._clock()
        draft = item.draft or self._proposed(item.proposed)
        if draft and (checked := self._decoding.check(draft)):
            seconds, events = self._clock() - began, tuple(checked.events)
            return WorkReport(seconds, events=events, drafted=checked.drafted)
        events = tuple(self._decoding.step())
        return WorkReport(self._clock() - began, events=events)

    def _proposed(self, count: int) -> Sequence[int]:
        """Return a draft of the only row by the draft model; empty if ``count`` is 0."""
        if not (count and self._proposer):
            return ()
        (row,) = self._decoding.rows
        last = self._decoding.token_in_flight
        proposed = self._proposer.propose(row.id, row.tokens, last, count)
        return [last, *proposed] if row.is_unreported else proposed

    def _prefill_draft_model(self, item: DraftPrefillItem) -> WorkReport:
        if self._proposer is None:
            raise RuntimeError("there is no draft model")
        waited = self._finish_decoding()
        (row,) = self._decoding.rows
        began = self._clock()
        self._proposer.prefill(row.id, row.tokens, item.start, item.count)
        return WorkReport(self._clock() - began, waited)

    def _affordable(self, joining: Sequence[Row], expected: int) -> int:
        """Return how many of the expected rows fit the memory, each as long as the longest row."""
        rows = [*self._decoding.rows, *joining]
        one = self._budget.row_bytes(1 + max((len(row.tokens) for row in rows), default=0))
        left = self._budget.budget_bytes - self._outside_bytes() - one * len(rows)
        return expected if left >= expected * one else max(0, int(left / one))

    def _make_room_for_buffers(self, rows: int) -> None:
        """Free the buffers that MLX keeps of a prefill, if they leave no room for those of steps.

        MLX keeps the oldest buffers. While they fill the limit, it returns all others to the
        system, and each step takes new pages: with 16 rows of 151,936 tokens 2,400 page faults, a
        tenth to a fifth of the CPU time of a step of a small model.

        Args:
            rows: Rows of the next steps.
        """
        needed = _LOGITS_ARRAYS * rows * self._vocab_size * mx.float32.size
        if needed > _FEW_BYTES and mx.get_cache_memory() + needed > self._budget.buffer_bytes:
            self._finish_decoding()
            mx.clear_cache()

    # -- prefill -----------------------------------------------------------------

    def _prefill(self, chunks: Sequence[PromptChunk]) -> WorkReport:
        waited = self._finish_decoding()
        for chunk in chunks:
            if chunk.restored:
                self._restore(self._outside[chunk.row], chunk.restored)
        if not any(chunk.count for chunk in chunks):
            return WorkReport(0.0, waited)
        rows = [self._outside[chunk.row] for chunk in chunks]
        ids = [
            list(row.prompt_ids[len(row.tokens) : len(row.tokens) + chunk.count])
            for row, chunk in zip(rows, chunks, strict=True)
        ]
        longest = len(rows[0].tokens) + max(map(len, ids))
        self._compact_to_fit(len(rows) * self._budget.row_bytes(longest))
        began = self._clock()
        numbers = [row.adapter for row in rows]
        with self._adapters.selection.of(numbers, max(map(len, ids))):
            found = self._prefill_with_logprobs(rows[0], ids[0])
            caches = [rows[0].caches] if found else self._prefill_rows(rows, ids)
        seconds = self._clock() - began
        for row, chunk, tokens, own in zip(rows, chunks, ids, caches, strict=True):
            row.caches = own
            row.tokens += tokens
            if chunk.is_stored:
                self._cache_prefix(row, row.caches)
        if found is None:
            return WorkReport(seconds, waited)
        if not rows[0].is_finite:
            return WorkReport(seconds, waited, events=(NotFinite(rows[0].id),))
        return WorkReport(seconds, waited, prompt_logprobs=found.read())

    def _prefill_rows(self, rows: Sequence[Row], ids: Sequence[Sequence[int]]) -> list[Caches]:
        """Prefill the next tokens of rows in one call; return their caches."""
        return prefill(self._model, [row.caches for row in rows], ids)

    def _prefill_with_logprobs(self, row: Row, ids: Sequence[int]) -> ChunkLogprobs | None:
        """Prefill the next tokens of a row whose prompt's log probabilities are requested.

        Returns:
            Those of the tokens that follow; None, without a computation, for any other row.
        """
        top = row.sampling.prompt_logprobs
        if top is None:
            return None
        begin = len(row.tokens) + 1
        following = row.prompt_ids[begin : begin + len(ids)]
        logits = self._model(mx.array([list(ids)]), cache=row.caches)[0]
        found = ChunkLogprobs(logits, following, top, self._agree)
        mx.eval([cache.state for cache in row.caches], found.arrays)
        row.is_finite = found.are_finite
        return found

    # -- embedding ---------------------------------------------------------------

    def _embed(self, chunks: Sequence[TextChunk]) -> WorkReport:
        texts = self._require_texts()
        waited = self._finish_decoding()
        if held := texts.held_after(chunks):
            self._compact_to_fit(self._budget.row_bytes(held))
        began = self._clock()
        events = texts.run(chunks)
        return WorkReport(self._clock() - began, waited, events=tuple(events))

    def _require_texts(self) -> TextRows:
        if self._texts is None:
            raise RuntimeError("this model does not embed texts")
        return self._texts

    def _finish_decoding(self) -> float:
        """Wait for the decode step in flight, as prefill would do anyway.

        Returns:
            The seconds waited, which are reported as time of the decode step, not of the prefill.
        """
        if not self._decoding.rows:
            return 0.0
        began = self._clock()
        self._decoding.finish()
        return self._clock() - began

    def _promote(self, row: Row) -> WorkReport:
        """Copy the next part of a prompt's prefix from disk to the prefix cache."""
        if self._disk is None:
            return WorkReport(0.0)
        waited = self._finish_decoding()
        began = self._clock()
        prompt_ids, salt = row.prompt_ids[:-1], row.cache_policy.salt
        is_promoting = self._disk.promote(row.id, prompt_ids, salt, _DISK_WAIT_SECONDS)
        return WorkReport(self._clock() - began, waited, is_promoting=is_promoting)

    def _restore(self, row: Row, count: int) -> None:
        """Replace a row's caches with a prefix from the prefix cache.

        Raises:
            RuntimeError: The prefix cache has a prefix of another length.
        """
        prompt_ids, salt = row.prompt_ids[:-1], row.cache_policy.salt
        found, segments, snapshot = self._prefix_cache.lookup(prompt_ids, salt)
        if found != count:
            raise RuntimeError(f"{found} tokens of a prompt are cached, but {count} were expected")
        row.caches = self._pieces.restore(segments, snapshot or [])
        row.tokens = list(row.prompt_ids[:count])

    # -- memory ------------------------------------------------------------------

    def _outside_bytes(self) -> int:
        """Return the bytes of caches outside the decode batch."""
        counts = [len(row.tokens) for row in self._outside.values()]
        counts += self._texts.held_counts if self._texts else []
        return sum(map(self._budget.row_bytes, counts))

    def _compact_to_fit(self, more_bytes: int) -> None:
        """Compact the decode batch if ``more_bytes`` in addition would exceed the budget."""
        held = self._decoding.nbytes + self._outside_bytes() + more_bytes
        if held > self._budget.budget_bytes and self._decoding.rows:
            self._decoding.compact()

    def _is_cached(self, row: Row) -> bool:
        """Return whether the tokens of a row are stored in the prefix cache."""
        return self._prefix_cache.is_enabled and row.cache_policy.writes

    def _cache_prefix(self, row: Row, caches: Caches) -> None:
        """Insert the tokens and caches of a row into the prefix cache."""
        if not (self._is_cached(row) and row.tokens):
            return
        salt = row.cache_policy.salt
        if not row.is_finite:
            # Ranks see different values, but must all keep the same prompts: they keep none of it.
            is_sound = _always_unsound if self._agree else self._pieces.is_finite
            self._prefix_cache.forget(row.tokens, is_sound, salt)
            if self._disk:
                self._disk.end(row.id, has_failed=True)
                self._disk.forget(row.tokens, salt)
            return
        snapshot = None
        if self._pieces.needs_snapshot:

            def snapshot() -> StateSnapshot:
                return self._pieces.snapshot(caches)

        self._prefix_cache.insert(
            row.tokens,
            lambda start, end: self._pieces.segment(caches, start, end),
            snapshot,
            salt=salt,
            token_bytes=self._pieces.token_bytes(caches),
        )
        if self._disk:
            self._disk.note(row.id, row.tokens, salt)


def _always_unsound(_segment: Segment, _snapshot: StateSnapshot | None) -> bool:
    return False
