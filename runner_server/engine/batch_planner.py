"""The order of work in one batch: prefill for a slice of time, then a decode step."""

from __future__ import annotations

from collections.abc import Sequence

from runner_server.engine.prefill_queue import FindPrefix, PrefillLimits, PrefillQueue
from runner_server.engine.types import Event
from runner_server.engine.work import DecodeItem, PrefillItem, WorkItem, WorkReport


class BatchPlanner:
    """Plans the work items of the rows in one batch.

    Items alternate: while prompts wait, chunks of them run until a slice of time is over, then one
    decode step. Each item is planned with the measured time of the one before, so a slice ends as
    soon as a chunk took longer than expected.

    Args:
        limits: What the model allows in one prefill call.
        find_prefix: Looks a prompt up in the prefix cache.
    """

    def __init__(self, limits: PrefillLimits, find_prefix: FindPrefix) -> None:
        self._prefills = PrefillQueue(limits, find_prefix)
        self._joining: list[int] = []
        self._decoding: set[int] = set()
        self._is_in_slice = False
        self._waited_seconds = 0.0
        self._decode_seconds = 0.0

    def add(self, row: int, prompt_ids: Sequence[int]) -> None:
        """Add a row; the next items prefill the prompt."""
        self._prefills.add(row, prompt_ids)

    def resume(self, row: int) -> None:
        """Let a preempted row join the next decode step."""
        self._joining.append(row)

    def remove(self, row: int) -> None:
        """Remove a row, if it is here: it has ended or is preempted."""
        self._prefills.remove(row)
        self._decoding.discard(row)
        if row in self._joining:
            self._joining.remove(row)

    def next_item(self) -> WorkItem | None:
        """Return the next item, which the caller runs and records.

        Returns:
            None at the end of a slice without rows to decode; the next call begins a new slice.
        """
        if not self._is_in_slice:
            self._is_in_slice = True
            self._prefills.begin_slice(self._decode_seconds, len(self._decoding))
        if item := self._prefills.next_item():
            return item
        self._is_in_slice = False
        if self._joining or self._decoding:
            return DecodeItem(tuple(self._joining), self._prefills.ending_soon)
        return None

    def record(self, item: WorkItem, report: WorkReport) -> list[Event]:
        """Record the result of an item; return its events."""
        if isinstance(item, PrefillItem):
            self._waited_seconds += report.waited_seconds
            events, ready = self._prefills.record(item, report.seconds)
            self._joining += ready
            return [*events]
        self._decoding.update(item.joining)
        self._joining = []
        # The wait before a slice belongs to the step that was waited for.
        self._decode_seconds = self._waited_seconds + report.seconds
        self._waited_seconds = 0.0
        return [*report.events]
