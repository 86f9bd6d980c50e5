"""Rows of one model driven directly, without engine thread and requests."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

from runner_server.engine.batch_planner import BatchPlanner
from runner_server.engine.types import CachePolicy, Token
from runner_server.engine.work import DecodeItem, PrefillItem, PromptChunk

if TYPE_CHECKING:
    from runner_server.engine.backend import Executor, LoadedModel, Matcher
    from runner_server.engine.prefill_queue import PrefillLimits
    from runner_server.engine.types import Event, Sampling


class LocalBatch:
    """Plans and runs the work items of rows on one executor.

    Args:
        executor: An executor without rows.
        limits: Limits of the model's prefill chunks.
        max_draft: Most tokens to draft for a row that is alone; 0 drafts none.
        draft_length: Most tokens that the draft model can read; 0 without one.
    """

    def __init__(
        self,
        executor: Executor,
        limits: PrefillLimits,
        max_draft: int = 0,
        draft_length: int = 0,
    ) -> None:
        self.executor = executor
        self._planner = BatchPlanner(
            limits, executor.find_prefix, max_draft, executor.find_on_disk, draft_length
        )

    @classmethod
    def of(cls, model: LoadedModel) -> LocalBatch:
        """Return a batch of a model without rows."""
        draft = model.info.draft
        length = draft.context_length if draft else 0
        return cls(model.new_executor(), model.prefill_limits, model.max_draft, length)

    def add(
        self,
        row: int,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        cache_policy: CachePolicy | None = None,
        *,
        matcher: Matcher | None = None,
        max_drafted: int = 0,
        adapter: str = "",
    ) -> None:
        """Add a row; the following steps prefill the prompt."""
        policy = cache_policy or CachePolicy()
        self.executor.add(row, prompt_ids, sampling, policy, matcher, adapter)
        needs_logits = sampling.prompt_logprobs is not None
        self._planner.add(
            row, prompt_ids, policy, needs_logits=needs_logits, max_drafted=max_drafted
        )

    def add_texts(self, row: int, texts: Sequence[Sequence[int]]) -> None:
        """Add texts to embed; the following steps evaluate them."""
        self.executor.add_texts(row, texts)
        self._planner.add_texts(row, [len(text) for text in texts])

    def step(self) -> list[Event]:
        """Prefill prompts for a slice of time, then make one decode step."""
        events: list[Event] = []
        while item := self._planner.next_item():
            events += self._planner.record(item, self.executor.run(item))
            if isinstance(item, DecodeItem):
                break
        return events

    def preempt(self, row: int) -> None:
        """Exclude a row with at least one token from the steps; keep its KV cache."""
        self.executor.preempt(row)
        self._planner.preempt(row)

    def resume(self, row: int) -> None:
        """Continue a preempted row."""
        self._planner.resume(row)

    def remove(self, rows: Collection[int]) -> None:
        """Remove rows, preempted ones included, and free their memory."""
        self.executor.remove(rows)
        for row in rows:
            self._planner.remove(row)

    def close(self) -> None:
        """Free everything; the batch cannot be used again."""
        self.executor.close()


def start_alone(
    model: LoadedModel,
    prompt_ids: Sequence[int],
    sampling: Sampling,
    matcher: Matcher | None = None,
    adapter: str = "",
) -> Executor:
    """Return an executor whose row 0 has its whole prompt in the caches and joins next."""
    executor = model.new_executor()
    executor.add(0, prompt_ids, sampling, CachePolicy(writes=False), matcher, adapter)
    count = len(prompt_ids) - 1
    executor.run(PrefillItem((PromptChunk(0, 0, count, is_stored=False),)))
    return executor


def decode_with_drafts(
    executor: Executor, count: int, draft: Callable[[int], Sequence[int]]
) -> tuple[list[Token], int]:
    """Decode the first tokens of row 0, which no policy but ``draft`` drafts.

    Args:
        executor: The result of :func:`start_alone`; closed at the end.
        count: Number of tokens.
        draft: Returns a draft of what follows the given number of tokens.

    Returns:
        The tokens, and the number of drafted ones that were checked.

    Raises:
        TypeError: The row failed.
    """
    tokens: list[Token] = []
    drafted = 0
    item = DecodeItem(joining=(0,))
    while len(tokens) < count:
        report = executor.run(item)
        drafted += report.drafted
        for event in report.events:
            if not isinstance(event, Token):
                raise TypeError(f"the row failed: {event}")
            tokens.append(event)
        item = DecodeItem(draft=tuple(draft(len(tokens))))
    executor.close()
    return tokens[:count], drafted
