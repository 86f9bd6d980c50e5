"""The order of work in one batch: prefill for a slice of time, then a decode step."""

from __future__ import annotations

from collections.abc import Sequence

from runner_server.engine.prefill_queue import (
    FindOnDisk,
    FindPrefix,
    PrefillLimits,
    PrefillQueue,
    find_nothing,
)
from runner_server.engine.speculation.drafting import Drafting
from runner_server.engine.speculation.model_drafting import ModelDrafting
from runner_server.engine.types import CachePolicy, Event, Token
from runner_server.engine.work import (
    DecodeItem,
    DraftPrefillItem,
    PromoteItem,
    WorkItem,
    WorkReport,
)


class BatchPlanner:
    """Plans the work items of the rows in one batch.

    While prompts wait, their chunks run for a slice of time, then one decode step runs, and so on.
    Each item is planned after the previous one was measured, so a slice ends early if a chunk took
    longer than expected. It also ends when the first row of an empty batch is ready: of 8 prompts
    of 256 tokens that arrive together, the median first token then comes after 0.19 s and not after
    0.29 s (demo model, 2 cores of an AMD EPYC, OpenBLAS).

    Args:
        limits: The model's limits of one prefill call.
        find_prefix: Looks a prompt up in the prefix cache.
        max_draft: Most tokens to draft for a row that is alone in the batch; 0 drafts none.
        find_on_disk: Looks a prompt up on disk.
        draft_length: Most tokens that the draft model can read; 0 without one.
    """

    def __init__(
        self,
        limits: PrefillLimits,
        find_prefix: FindPrefix,
        max_draft: int = 0,
        find_on_disk: FindOnDisk = find_nothing,
        draft_length: int = 0,
    ) -> None:
        self._prefills = PrefillQueue(limits, find_prefix, find_on_disk)
        self._drafting = Drafting(max_draft)
        self._model_drafting = (
            ModelDrafting(max_draft, limits.max_chunk, draft_length, self._drafting.pace)
            if max_draft and draft_length
            else None
        )
        self._has_draft_model_run = False
        self._joining: list[int] = []
        self._decoding: set[int] = set()
        self._is_in_slice = False
        self._waited_seconds = 0.0
        self._decode_seconds = 0.0

    def add(
        self,
        row: int,
        prompt_ids: Sequence[int],
        cache_policy: CachePolicy,
        *,
        needs_logits: bool = False,
        max_drafted: int = 0,
    ) -> None:
        """Add a row whose prompt is to be prefilled; see ``PrefillQueue.add``.

        Args:
            row: Id of the row.
            prompt_ids: The whole prompt.
            cache_policy: Use of the prefix cache.
            needs_logits: Whether the logits of every token are computed.
            max_drafted: Most tokens to generate; 0 if none of them may be drafted.
        """
        self._prefills.add(row, prompt_ids, cache_policy, needs_logits=needs_logits)
        if max_drafted:
            self._drafting.add(row, prompt_ids, max_drafted)
            if self._model_drafting:
                self._model_drafting.add(row, len(prompt_ids), max_drafted)

    def add_texts(self, row: int, lengths: Sequence[int]) -> None:
        """Add the texts of a request to embed, with the number of tokens of each."""
        self._prefills.add_texts(row, lengths)

    def resume(self, row: int) -> None:
        """Let a preempted row join the next decode step."""
        self._joining.append(row)

    def remove(self, row: int) -> None:
        """Remove an ended row, or an ended request to embed. No-op if unknown."""
        self._drafting.remove(row)
        if self._model_drafting:
            self._model_drafting.remove(row)
        self.preempt(row)

    def preempt(self, row: int) -> None:
        """Plan no more work for a row until it resumes."""
        self._prefills.remove(row)
        self._decoding.discard(row)
        if row in self._joining:
            self._joining.remove(row)

    def next_item(self) -> WorkItem | None:
        """Return the next item, which the caller runs and records.

        Returns:
            None if a slice ended and no row can decode; the next call begins a new slice.
        """
        if not self._is_in_slice:
            self._is_in_slice = True
            self._prefills.begin_slice(self._decode_seconds, len(self._decoding))
        is_first_ready = bool(self._joining) and not self._decoding
        if not is_first_ready and (item := self._prefills.next_item()):
            return item
        self._is_in_slice = False
        if self._joining or self._decoding:
            return self._decode_item()
        return None

    def record(self, item: WorkItem, report: WorkReport) -> list[Event]:
        """Record the result of an item; return the events of the rows."""
        if isinstance(item, PromoteItem):
            self._waited_seconds += report.waited_seconds
            self._prefills.record_promotion(item, report)
            return []
        if isinstance(item, DraftPrefillItem):
            self._waited_seconds += report.waited_seconds
            if self._model_drafting:
                self._model_drafting.record_chunk(item.row, item.count, report.seconds)
            return []
        if not isinstance(item, DecodeItem):
            self._waited_seconds += report.waited_seconds
            events, ready = self._prefills.record(item, report)
            self._joining += ready
            if self._model_drafting:
                self._model_drafting.record_prompts(report.seconds)
            return [*report.events, *events]
        # Other work waits for the step in flight first; that wait counts towards the step.
        self._decode_seconds = self._waited_seconds + report.seconds
        self._waited_seconds = 0.0
        self._record_drafting(item, report)
        self._decoding.update(item.joining)
        self._joining = []
        return [*report.events]

    @property
    def _alone(self) -> int | None:
        """The row without others in the batch, whose tokens may be drafted; None otherwise."""
        if len(self._decoding) != 1 or self._joining or self._prefills:
            return None
        (row,) = self._decoding
        return row

    def _decode_item(self) -> DecodeItem | DraftPrefillItem:
        """Return the next step, or between two steps a chunk for the draft model."""
        draft: tuple[int, ...] = ()
        proposed = 0
        if (row := self._alone) is not None:
            draft = self._drafting.draft(row)
            if self._model_drafting and not draft:
                if chunk := self._draft_chunk(self._model_drafting, row):
                    return chunk
                proposed = self._model_drafting.proposal(row)
        self._has_draft_model_run = False
        joining = tuple(self._joining)
        return DecodeItem(joining, self._prefills.ending_soon, draft, proposed)

    def _draft_chunk(self, drafting: ModelDrafting, row: int) -> DraftPrefillItem | None:
        """Return a chunk for the draft model, unless one has run since the last step."""
        start, count = (0, 0) if self._has_draft_model_run else drafting.next_chunk(row)
        self._has_draft_model_run = bool(count)
        return DraftPrefillItem(row, start, count) if count else None

    def _record_drafting(self, item: DecodeItem, report: WorkReport) -> None:
        tokens: dict[int, list[int]] = {}
        accepted = 0
        for event in report.events:
            if isinstance(event, Token):
                tokens.setdefault(event.row, []).append(event.token_id)
                accepted += event.is_drafted
        self._drafting.record(tokens)
        if self._model_drafting:
            self._model_drafting.record(tokens)
        if len(self._decoding) != 1 or item.joining:
            return
        (row,) = self._decoding
        yielded, seconds = len(tokens.get(row, ())), self._decode_seconds
        if self._model_drafting and item.proposed:
            self._model_drafting.record_draft(row, item.proposed, accepted, yielded, seconds)
        else:
            self._drafting.record_alone(row, report.drafted, yielded, seconds)
            if self._model_drafting and not report.drafted:
                self._model_drafting.record_step(yielded)
