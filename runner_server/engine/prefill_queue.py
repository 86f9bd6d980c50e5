"""The prompts in prefill and the texts to embed, and their next chunks."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice

from runner_server.engine.embedding.texts import TextJob, texts_together
from runner_server.engine.prefill_policy import PrefillPolicy
from runner_server.engine.prefix_cache import Match
from runner_server.engine.types import CachePolicy, Prefill
from runner_server.engine.work import (
    EmbedItem,
    PrefillItem,
    PromoteItem,
    PromptChunk,
    WorkReport,
)

_WORTHWHILE = 32
"""Fewest tokens that a snapshot must save a later prompt, to be worth ending a chunk for."""

FindPrefix = Callable[[Sequence[int], str], Match]
"""Finds the longest prefix of a prompt in the prefix cache, among the entries of a salt."""

FindOnDisk = Callable[[Sequence[int], str], int]
"""Returns the number of leading tokens of a prompt that are on disk, as entries of a salt."""


def find_nothing(_prompt_ids: Sequence[int], _salt: str) -> int:
    """Return 0: nothing is on disk."""
    return 0


@dataclass(frozen=True)
class PrefillLimits:
    """Limits set by a model on the chunks of prompts.

    Attributes:
        max_chunk: Most tokens of one prompt in one call, which bounds the call's working memory.
        max_tokens: Most tokens of several prompts in one call.
        max_logits: Most tokens of a prompt in one call that computes their logits.
        can_pad: Whether chunks of unequal length may share a call.
        needs_snapshot: Whether a prefix can be reused only where a snapshot was taken.
        max_prompts: Returns the most prompts that memory allows in one call, given the tokens to
            prefill of each and the tokens already in its caches.
        max_texts: Returns the most texts to embed in one call, given the tokens of the longest.
    """

    max_chunk: int
    max_tokens: int
    max_logits: int = 1 << 30
    can_pad: bool = True
    needs_snapshot: bool = False
    max_prompts: Callable[[int, int], int] = lambda _length, _before: 1 << 30
    max_texts: Callable[[int], int] = lambda _length: 1 << 30


@dataclass(eq=False)
class _Prompt:
    """A prompt in prefill, which ends before the last token: that is the first decode input.

    Attributes:
        row: Id of the row.
        ids: The whole prompt.
        cache_policy: Use of the prefix cache.
        needs_logits: Whether the logits of every token are computed.
        prefilled: Tokens in the row's caches.
        position: Start of the next chunk, by the latest lookup in the prefix cache.
        cached: Tokens restored from the prefix cache.
        on_disk: Leading tokens to copy from disk to the prefix cache; 0 = none, or no longer.
    """

    row: int
    ids: array[int]
    cache_policy: CachePolicy
    needs_logits: bool = False
    prefilled: int = 0
    position: int = 0
    cached: int = 0
    on_disk: int = 0

    @property
    def end(self) -> int:
        return len(self.ids) - 1

    @property
    def remaining(self) -> int:
        # Not 0 while a prefix is being copied, so that the copy ends with the slice.
        return self.end - max(self.position, min(self.on_disk, self.end - 1))

    @property
    def is_on_disk(self) -> bool:
        return self.on_disk > self.position


@dataclass(frozen=True)
class ChunkStart:
    """Start of a prompt's next chunk.

    Attributes:
        row: Id of the row.
        position: Tokens in the row's caches, once the prefix is restored.
        restored: Length of the prefix to restore first; 0 = none.
        end: Position at which the prefill of the prompt ends.
        branch: Position at which a cached prompt diverges from this one, if a snapshot there would
            help later prompts.
        lookahead: The next tokens, as many as decide whether two prompts continue alike.
        cache_policy: Use of the prefix cache.
    """

    row: int
    position: int
    restored: int
    end: int
    branch: int | None
    lookahead: tuple[int, ...]
    cache_policy: CachePolicy = field(default_factory=CachePolicy)

    @property
    def remaining(self) -> int:
        """Tokens left to prefill."""
        return self.end - self.position

    @property
    def continuation(self) -> tuple[str, tuple[int, ...]]:
        """Equal for two prompts at one position that can share their next tokens."""
        return self.cache_policy.salt, self.lookahead

    def chunk(self, count: int, *, needs_snapshot: bool) -> PromptChunk:
        """Return a chunk of at most ``count`` tokens, which ends at the branch at the latest."""
        last = min(self.position + count, self.end)
        if self.branch is not None:
            last = min(last, self.branch)
        # A snapshot takes the memory of a whole state, so only the useful ones are taken.
        is_stored = last in (self.branch, self.end) or not needs_snapshot
        length = last - self.position
        is_stored = is_stored and length > 0 and self.cache_policy.writes
        return PromptChunk(self.row, self.restored, length, is_stored)


class PrefillQueue:
    """Queue of the prompts in prefill and of the texts to embed, in order of arrival.

    All texts of a request count like one prompt when time is divided.

    Args:
        limits: The model's limits of one prefill call.
        find_prefix: Looks a prompt up in the prefix cache.
        find_on_disk: Looks a prompt up on disk, once.
    """

    def __init__(
        self,
        limits: PrefillLimits,
        find_prefix: FindPrefix,
        find_on_disk: FindOnDisk = find_nothing,
    ) -> None:
        self._limits = limits
        self._find_prefix = find_prefix
        self._find_on_disk = find_on_disk
        self._policy = PrefillPolicy(limits.max_chunk)
        self._prompts: dict[int, _Prompt] = {}
        self._texts: dict[int, TextJob] = {}
        # The rows of both, in order of arrival.
        self._order: dict[int, None] = {}
        # The row whose prefix was copied from disk last.
        self._promoted = -1

    def __len__(self) -> int:
        return len(self._order)

    def add(
        self,
        row: int,
        prompt_ids: Sequence[int],
        cache_policy: CachePolicy,
        *,
        needs_logits: bool = False,
    ) -> None:
        """Add the prompt of a row.

        Args:
            row: Id of the row.
            prompt_ids: The whole prompt.
            cache_policy: Use of the prefix cache. A prompt that needs logits does not read it.
            needs_logits: Whether the logits of every token are computed, for which the prompt runs
                alone and in chunks of at most ``PrefillLimits.max_logits``.
        """
        ids = array("i", prompt_ids)
        self._order[row] = None
        prompt = self._prompts[row] = _Prompt(row, ids, cache_policy, needs_logits)
        prompt.position = self._look_up(prompt).position
        if cache_policy.reads and prompt.remaining >= _WORTHWHILE:
            on_disk = self._find_on_disk(ids[:-1], cache_policy.salt)
            prompt.on_disk = on_disk if on_disk - prompt.position >= _WORTHWHILE else 0

    def add_texts(self, row: int, lengths: Sequence[int]) -> None:
        """Add the texts of a request, with the number of tokens of each."""
        self._order[row] = None
        self._texts[row] = TextJob(row, lengths)

    def remove(self, row: int) -> None:
        """Remove the prompt of a row, or the texts of a request. No-op if unknown."""
        self._order.pop(row, None)
        self._prompts.pop(row, None)
        self._texts.pop(row, None)

    @property
    def ending_soon(self) -> int:
        """Number of prompts whose next chunk may be the last."""
        return sum(each.remaining <= self._limits.max_chunk for each in self._prompts.values())

    def begin_slice(self, decode_seconds: float, decoding: int) -> None:
        """Begin a slice of time; see ``PrefillPolicy.begin_slice``."""
        self._policy.begin_slice(decode_seconds, decoding, len(self._order))

    def next_item(self) -> PrefillItem | PromoteItem | EmbedItem | None:
        """Return the next chunks, or first the next copy of a prefix from disk.

        The caller must :meth:`record` them before the next call.

        Returns:
            None when the slice is over or nothing is left.
        """
        choice = self._policy.next({row: self._remaining(row) for row in self._order})
        if choice is None:
            return None
        row, count = choice
        if row in self._texts:
            return self._embed(self._texts[row], count)
        return self._prefill(self._prompts[row], count)

    def _remaining(self, row: int) -> int:
        return (self._prompts.get(row) or self._texts[row]).remaining

    def _embed(self, job: TextJob, count: int) -> EmbedItem:
        chunk = job.next_chunk(count, self._limits.max_chunk)
        if not job.is_whole(chunk):
            return EmbedItem((chunk,))
        others = (each for each in self._texts.values() if each is not job)
        tokens = max(count, min(self._policy.token_capacity, self._limits.max_tokens))
        most = min(tokens // chunk.count, self._limits.max_texts(chunk.count))
        return EmbedItem(texts_together(job, chunk, others, most))

    def _prefill(self, prompt: _Prompt, count: int) -> PrefillItem | PromoteItem:
        first = self._look_up(prompt)
        prompt.position = first.position
        if prompt.is_on_disk:
            return self._promote(prompt)
        if prompt.needs_logits:
            count = min(count, self._limits.max_logits)
        starts = [first, *self._companions(first, count, is_alone=prompt.needs_logits)]
        needs_snapshot = self._limits.needs_snapshot
        return PrefillItem(
            tuple(start.chunk(count, needs_snapshot=needs_snapshot) for start in starts)
        )

    def _promote(self, prompt: _Prompt) -> PromoteItem:
        """Return the next copy of the prefix in transit, which may be another prompt's.

        One prefix is copied to its end before the next. Reads of one end when another begins, so
        that two prompts that take turns after each wait for a slow disk would both never end.
        """
        last = self._prompts.get(self._promoted, prompt)
        self._promoted = last.row if last.is_on_disk else prompt.row
        return PromoteItem(self._promoted)

    def record(
        self, item: PrefillItem | EmbedItem, report: WorkReport
    ) -> tuple[list[Prefill], list[int]]:
        """Record the chunks run, and the report of their results.

        Returns:
            The progress of each prompt, and the rows whose prefill is complete.
        """
        tokens = sum(chunk.count for chunk in item.chunks)
        if tokens:
            self._policy.record(tokens, report.seconds)
        if isinstance(item, EmbedItem):
            return self._record_texts(item), []
        return self._record_prompts(item, report)

    def _record_texts(self, item: EmbedItem) -> list[Prefill]:
        events = []
        for chunk in item.chunks:
            job = self._texts[chunk.row]
            if progress := job.record(chunk):
                events.append(Prefill(chunk.row, *progress))
            if not job.remaining:
                self.remove(chunk.row)
        return events

    def _record_prompts(
        self, item: PrefillItem, report: WorkReport
    ) -> tuple[list[Prefill], list[int]]:
        events, ready = [], []
        for chunk in item.chunks:
            prompt = self._prompts[chunk.row]
            if chunk.restored:
                prompt.cached += chunk.restored - prompt.prefilled
                prompt.prefilled = chunk.restored
            prompt.prefilled += chunk.count
            prompt.position = prompt.prefilled
            total, logprobs = len(prompt.ids), report.prompt_logprobs
            events.append(Prefill(chunk.row, prompt.prefilled, total, prompt.cached, logprobs))
            if prompt.prefilled == prompt.end:
                self.remove(chunk.row)
                ready.append(chunk.row)
        return events, ready

    def record_promotion(self, item: PromoteItem, report: WorkReport) -> None:
        """Record the copy of a part of a prompt's prefix from disk."""
        self._policy.spend(report.seconds)
        if not report.is_promoting:
            self._prompts[item.row].on_disk = 0

    def _look_up(self, prompt: _Prompt) -> ChunkStart:
        """Return the start of a prompt's next chunk, after a new lookup in the prefix cache.

        Other prompts may have been inserted since the previous lookup.
        """
        policy = prompt.cache_policy
        match = Match(0, 0)
        if policy.reads:
            match = self._find_prefix(prompt.ids[:-1], policy.salt)
        restored = match.usable if match.usable > prompt.prefilled else 0
        position = max(prompt.prefilled, match.usable)
        # With a snapshot where the two prompts part, a third one can reuse what they share.
        gain = match.common - match.usable
        is_useful = gain >= _WORTHWHILE and match.common > position
        branch = match.common if self._limits.needs_snapshot and is_useful else None
        lookahead = tuple(prompt.ids[position : position + _WORTHWHILE])
        return ChunkStart(prompt.row, position, restored, prompt.end, branch, lookahead, policy)

    def _companions(self, first: ChunkStart, count: int, *, is_alone: bool) -> list[ChunkStart]:
        """Return the starts of the prompts to prefill in the same call as ``first``."""
        length = first.remaining
        is_alone = is_alone or first.branch is not None
        if length < 2 or count < length or is_alone:
            return []
        affordable = min(self._policy.token_capacity, self._limits.max_tokens) // length
        most = min(affordable, self._limits.max_prompts(length, first.position)) - 1
        if most < 1:
            return []
        others = (
            each
            for each in self._prompts.values()
            if each.row != first.row and not (each.needs_logits or each.is_on_disk)
        )
        candidates = (self._look_up(each) for each in islice(others, 2 * most))
        shortest = length // 2 if self._limits.can_pad else length
        return companions(first, candidates, most, shortest)


def companions(
    first: ChunkStart, candidates: Iterable[ChunkStart], most: int, shortest: int
) -> list[ChunkStart]:
    """Choose prompts to prefill in the same call as another one, which reads the weights once.

    Each starts at the same position as ``first`` and is prefilled to its end. A prompt that
    continues like one already chosen is left out if both use the prefix cache: it waits, and takes
    their common tokens from the cache.

    For example, with ``first`` at position 0 and 60 tokens left, and ``shortest`` 30: a prompt of
    50 other tokens joins; one of 20 does not, because padding would cost more than a separate
    call; nor does one that starts at position 16, nor a second one with the same 50 tokens.

    Args:
        first: The prompt chosen by the policy.
        candidates: Other prompts, in order of arrival.
        most: Most prompts to choose.
        shortest: Fewest tokens that a chosen prompt has left.
    """
    chosen: list[ChunkStart] = []
    # The continuations that will be in the prefix cache, and their salts.
    stored = {first.continuation} if first.cache_policy.writes else set()
    for each in candidates:
        if len(chosen) == most:
            break
        is_level = each.position == first.position and each.branch is None
        is_fit = is_level and shortest <= each.remaining <= first.remaining
        waits = each.cache_policy.reads and each.continuation in stored
        if is_fit and not waits:
            chosen.append(each)
            if each.cache_policy.writes:
                stored.add(each.continuation)
    return chosen
