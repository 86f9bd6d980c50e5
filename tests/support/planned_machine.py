"""A simulated machine that runs the items of a batch planner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from runner_server.engine.batch_planner import BatchPlanner
from runner_server.engine.prefill_queue import PrefillLimits
from runner_server.engine.prefix_cache import Match
from runner_server.engine.types import CachePolicy, Prefill, Token
from runner_server.engine.work import (
    DecodeItem,
    DraftPrefillItem,
    EmbedItem,
    PrefillItem,
    PromoteItem,
    WorkItem,
    WorkReport,
)

PACE = 2000.0
"""Tokens a second of the simulated machine, in prefill and in decode."""

PART = 16
"""Tokens that an item copies from the simulated disk, at ten times the pace of prefill."""

LIMITS = PrefillLimits(max_chunk=64, max_tokens=256)


@dataclass
class Machine:
    """Runs the planner's items in simulated time.

    Attributes:
        clock: Seconds since the start.
        tokens: Number of tokens that each row has generated.
        progress: Last progress of each row's prompt.
        stored: Prefixes in the simulated prefix cache, which has no salts.
        on_disk: Prefixes on the simulated disk.
        lost_from: Position from which on nothing can be read from the disk.
        items: Items run until now.
        embedded: Texts embedded, by request.
    """

    limits: PrefillLimits = LIMITS
    keeps_prefixes: bool = False
    call_seconds: float = 0.0
    clock: float = 0.0
    tokens: dict[int, int] = field(default_factory=dict)
    progress: dict[int, Prefill] = field(default_factory=dict)
    stored: list[tuple[int, ...]] = field(default_factory=list)
    on_disk: list[tuple[int, ...]] = field(default_factory=list)
    lost_from: int = 1 << 30
    items: list[WorkItem] = field(default_factory=list)
    embedded: dict[int, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.planner = BatchPlanner(self.limits, self.find_prefix, find_on_disk=self.find_on_disk)
        self._prompts: dict[int, Sequence[int]] = {}
        self._decoding: set[int] = set()
        self._prefilled: dict[int, int] = {}
        self._lengths: dict[int, Sequence[int]] = {}
        # The text of each request of which a part was evaluated, and the number of its tokens.
        self._evaluated: dict[int, tuple[int | None, int]] = {}

    def add(
        self,
        row: int,
        prompt: Sequence[int],
        cache_policy: CachePolicy | None = None,
        *,
        needs_logits: bool = False,
    ) -> None:
        """Add a row."""
        self._prompts[row], self._prefilled[row], self.tokens[row] = prompt, 0, 0
        policy = cache_policy or CachePolicy()
        self.planner.add(row, prompt, policy, needs_logits=needs_logits)

    def add_texts(self, row: int, lengths: Sequence[int]) -> None:
        """Add the texts of a request to embed."""
        self._lengths[row], self.embedded[row] = lengths, []
        self._evaluated[row] = (None, 0)
        self.planner.add_texts(row, lengths)

    def remove(self, row: int) -> None:
        """Remove a row, or a request to embed."""
        self._decoding.discard(row)
        self._lengths.pop(row, None)
        self._prompts.pop(row, None)
        self.planner.remove(row)

    def find_prefix(self, prompt: Sequence[int], _salt: str) -> Match:
        """Return the longest stored prefix."""
        lengths = [_common_length(prompt, stored) for stored in self.stored]
        common = max(lengths, default=0)
        if not self.limits.needs_snapshot:
            return Match(common, common)
        whole = [len(s) for s in self.stored if tuple(prompt[: len(s)]) == s]
        return Match(max(whole, default=0), common)

    def find_on_disk(self, prompt: Sequence[int], _salt: str) -> int:
        """Return the length of the longest prefix on disk."""
        return max((_common_length(prompt, held) for held in self.on_disk), default=0)

    def run_item(self) -> WorkItem | None:
        """Run the next item."""
        item = self.planner.next_item()
        if item is None:
            return None
        self.items.append(item)
        if isinstance(item, PrefillItem):
            report = self._prefill(item)
        elif isinstance(item, PromoteItem):
            report = self._promote(item)
        elif isinstance(item, EmbedItem):
            report = self._embed(item)
        elif isinstance(item, DraftPrefillItem):
            raise TypeError("the machine has no draft model")
        else:
            self._decoding.update(item.joining)
            report = self._spend(len(self._decoding))
            report = replace(report, events=tuple(Token(row, 1) for row in self._decoding))
        for event in self.planner.record(item, report):
            if isinstance(event, Prefill):
                self.progress[event.row] = event
            elif isinstance(event, Token):
                self.tokens[event.row] += 1
        return item

    def step(self) -> None:
        """Run items up to the next decode step, or to the end of a slice without one."""
        while (item := self.run_item()) and not isinstance(item, DecodeItem):
            pass

    def _promote(self, item: PromoteItem) -> WorkReport:
        prompt = tuple(self._prompts[item.row][:-1])
        reached = self.find_prefix(prompt, "").common + PART
        report = self._spend(PART // 10)
        if reached > self.lost_from:
            return report
        self.stored.append(prompt[:reached])
        return replace(report, is_promoting=reached < self.find_on_disk(prompt, ""))

    def _embed(self, item: EmbedItem) -> WorkReport:
        for chunk in item.chunks:
            length = self._lengths[chunk.row][chunk.text]
            text, done = self._evaluated[chunk.row]
            assert text in (None, chunk.text), "two texts of a request are evaluated in part"
            done += chunk.count
            assert chunk.is_last == (done == length)
            assert len(item.chunks) == 1 or chunk.count == length
            assert 0 < chunk.count <= self.limits.max_chunk
            self._evaluated[chunk.row] = (None, 0) if chunk.is_last else (chunk.text, done)
            if chunk.is_last:
                self.embedded[chunk.row].append(chunk.text)
        # A machine evaluates padding, too.
        longest = max(chunk.count for chunk in item.chunks)
        assert len(item.chunks) == 1 or len(item.chunks) * longest <= self.limits.max_tokens
        return self._spend(len(item.chunks) * longest)

    def _prefill(self, item: PrefillItem) -> WorkReport:
        for chunk in item.chunks:
            prompt = self._prompts[chunk.row]
            if chunk.restored:
                assert chunk.restored > self._prefilled[chunk.row]
                self._prefilled[chunk.row] = chunk.restored
            self._prefilled[chunk.row] += chunk.count
            assert chunk.count <= self.limits.max_chunk
            assert self._prefilled[chunk.row] <= len(prompt) - 1
            if self.keeps_prefixes and chunk.is_stored:
                self.stored.append(tuple(prompt[: self._prefilled[chunk.row]]))
        return self._spend(sum(chunk.count for chunk in item.chunks))

    def _spend(self, tokens: int) -> WorkReport:
        seconds = self.call_seconds + tokens / PACE
        self.clock += seconds
        return WorkReport(seconds)


def _common_length(one: Sequence[int], other: Sequence[int]) -> int:
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count
