"""Prompts in prefill: which of them run next, how many tokens, and what they reuse."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from runner_server.engine.prefill_policy import PrefillPolicy
from runner_server.engine.prefix_cache import Match
from runner_server.engine.types import Prefill
from runner_server.engine.work import PrefillItem, PromptChunk

_WORTHWHILE = 32
"""Fewest tokens worth a stop at the branch from an earlier prompt, for a snapshot there."""

FindPrefix = Callable[[Sequence[int]], Match]
"""Returns the length of a prompt's longest prefix in the prefix cache."""


@dataclass(frozen=True)
class PrefillLimits:
    """Properties of a model that limit the chunks of its prompts.

    Attributes:
        max_chunk: Most tokens of one prompt in one call, which bounds the call's working memory.
        max_tokens: Most tokens of several prompts in one call.
        can_pad: Whether prompts of unequal length may share a call.
        needs_snapshot: Whether a prefix can be reused only where a snapshot was taken.
        max_prompts: The most prompts that memory allows in one call, by the tokens of each to
            prefill and the tokens of each before them.
    """

    max_chunk: int
    max_tokens: int
    can_pad: bool = True
    needs_snapshot: bool = False
    max_prompts: Callable[[int, int], int] = lambda _length, _before: 1 << 30


@dataclass(eq=False)
class _Prompt:
    """A prompt in prefill; the last token is left to the first decode step.

    Attributes:
        row: Id of the row.
        ids: The whole prompt.
        prefilled: Tokens in the row's caches.
        reusable: Length of the cached prefix when last looked up.
        cached: Tokens restored from the prefix cache.
    """

    row: int
    ids: array[int]
    prefilled: int = 0
    reusable: int = 0
    cached: int = 0

    @property
    def end(self) -> int:
        return len(self.ids) - 1

    @property
    def remaining(self) -> int:
        return self.end - max(self.prefilled, self.reusable)


@dataclass(frozen=True)
class ChunkStart:
    """Where the next chunk of a prompt starts.

    Attributes:
        row: Id of the row.
        position: Tokens prefilled or about to be restored.
        restored: Length of the prefix to restore to get there; 0 = none.
        end: Tokens of the prompt to prefill in all.
        branch: Position at which an earlier prompt diverges, if a snapshot there is useful.
        lookahead: Enough of the next tokens to compare with another prompt.
    """

    row: int
    position: int
    restored: int
    end: int
    branch: int | None
    lookahead: tuple[int, ...]

    @property
    def remaining(self) -> int:
        """Tokens left to prefill."""
        return self.end - self.position

    def chunk(self, count: int, *, needs_snapshot: bool) -> PromptChunk:
        """Return the chunk of at most ``count`` tokens, none of them beyond the branch."""
        last = min(self.position + count, self.end)
        if self.branch is not None:
            last = min(last, self.branch)
        # A snapshot costs the memory of a whole state, so only those likely to be reused are taken.
        is_stored = last in (self.branch, self.end) or not needs_snapshot
        length = last - self.position
        return PromptChunk(self.row, self.restored, length, is_stored and length > 0)


class PrefillQueue:
    """The prompts in prefill, in order of arrival.

    Args:
        limits: What the model allows.
        find_prefix: Looks a prompt up in the prefix cache.
    """

    def __init__(self, limits: PrefillLimits, find_prefix: FindPrefix) -> None:
        self._limits = limits
        self._find_prefix = find_prefix
        self._policy = PrefillPolicy(limits.max_chunk)
        self._prompts: dict[int, _Prompt] = {}

    def __len__(self) -> int:
        return len(self._prompts)

    def add(self, row: int, prompt_ids: Sequence[int]) -> None:
        """Add the prompt of a row."""
        prompt = self._prompts[row] = _Prompt(row, array("i", prompt_ids))
        self._start(prompt)

    def remove(self, row: int) -> None:
        """Remove a prompt if it is here."""
        self._prompts.pop(row, None)

    @property
    def ending_soon(self) -> int:
        """How many prompts end with their next chunk."""
        return sum(each.remaining <= self._limits.max_chunk for each in self._prompts.values())

    def begin_slice(self, decode_seconds: float, decoding: int) -> None:
        """Begin a slice of time; see ``PrefillPolicy.begin_slice``."""
        self._policy.begin_slice(decode_seconds, decoding, len(self._prompts))

    def next_item(self) -> PrefillItem | None:
        """Return the next chunks; None when the slice is over or no prompt is left.

        The caller reports them with :meth:`record` before it asks again.
        """
        choice = self._policy.next({row: each.remaining for row, each in self._prompts.items()})
        if choice is None:
            return None
        row, count = choice
        first = self._start(self._prompts[row])
        starts = [first, *self._companions(first, count)]
        needs_snapshot = self._limits.needs_snapshot
        return PrefillItem(
            tuple(start.chunk(count, needs_snapshot=needs_snapshot) for start in starts)
        )

    def record(self, item: PrefillItem, seconds: float) -> tuple[list[Prefill], list[int]]:
        """Record finished chunks.

        Returns:
            The progress of each prompt, and the rows whose prompts are prefilled.
        """
        tokens = sum(chunk.count for chunk in item.chunks)
        if tokens:
            self._policy.record(tokens, seconds)
        events, ready = [], []
        for chunk in item.chunks:
            prompt = self._prompts[chunk.row]
            if chunk.restored:
                prompt.cached += chunk.restored - prompt.prefilled
                prompt.prefilled = chunk.restored
            prompt.prefilled += chunk.count
            events.append(Prefill(chunk.row, prompt.prefilled, len(prompt.ids), prompt.cached))
            if prompt.prefilled == prompt.end:
                del self._prompts[chunk.row]
                ready.append(chunk.row)
        return events, ready

    def _start(self, prompt: _Prompt) -> ChunkStart:
        """Look a prompt up in the prefix cache, which other prompts may have filled meanwhile."""
        match = self._find_prefix(prompt.ids[:-1])
        prompt.reusable = match.usable
        restored = match.usable if match.usable > prompt.prefilled else 0
        position = max(prompt.prefilled, match.usable)
        # A later prompt with the same prefix can then reuse the snapshot at its end.
        gain = match.common - match.usable
        is_useful = gain >= _WORTHWHILE and match.common > position
        branch = match.common if self._limits.needs_snapshot and is_useful else None
        lookahead = tuple(prompt.ids[position : position + _WORTHWHILE])
        return ChunkStart(prompt.row, position, restored, prompt.end, branch, lookahead)

    def _companions(self, first: ChunkStart, count: int) -> list[ChunkStart]:
        """Return the starts of further prompts that run in the same call as ``first``."""
        length = first.remaining
        if length < 2 or count < length or first.branch is not None:
            return []
        affordable = min(self._policy.token_capacity, self._limits.max_tokens) // length
        most = min(affordable, self._limits.max_prompts(length, first.position)) - 1
        if most < 1:
            return []
        others = (each for each in self._prompts.values() if each.row != first.row)
        candidates = (self._start(each) for each in islice(others, 2 * most))
        shortest = length // 2 if self._limits.can_pad else length
        return companions(first, candidates, most, shortest)


def companions(
    first: ChunkStart, candidates: Iterable[ChunkStart], most: int, shortest: int
) -> list[ChunkStart]:
    """Choose prompts to prefill in the same call as another one, which reads the weights once.

    Each starts at the same position as ``first`` and is prefilled to its end. A prompt that
    continues like one already chosen is left out: their common tokens are prefilled once, and taken
    from the prefix cache the second time.

    For example, with ``first`` at position 0 and 60 tokens left, and ``shortest`` 30: a prompt of
    50 other tokens rides along; one of 20 does not, because padding would cost more than its own
    call; nor does one that starts at position 16, nor a second one with the same 50 tokens.

    Args:
        first: The prompt chosen by the policy.
        candidates: Other prompts, in order of arrival.
        most: The most prompts to choose.
        shortest: Fewest tokens left of a prompt to choose.
    """
    chosen: list[ChunkStart] = []
    continuations = {first.lookahead}
    for each in candidates:
        if len(chosen) == most:
            break
        is_level = each.position == first.position and each.branch is None
        is_fit = is_level and shortest <= each.remaining <= first.remaining
        if is_fit and each.lookahead not in continuations:
            continuations.add(each.lookahead)
            chosen.append(each)
    return chosen
