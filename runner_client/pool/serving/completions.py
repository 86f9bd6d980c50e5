"""Completions in progress on a pool: their end by ``Abort``, and ``Drain``."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING

from runner_client.errors import RequestAbortedError, ShuttingDownError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator


class PooledCompletion:
    """A completion from its arrival to its end, first waiting for its model.

    Create instances in the task of the call.

    Args:
        request_id: The caller's name for it.
    """

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.ended = asyncio.Event()
        self.aborted_by = ""
        self._task = asyncio.current_task()
        self._cancel_call: Callable[[], object] | None = None

    @property
    def is_waiting(self) -> bool:
        """Whether it still waits for its model."""
        return self._cancel_call is None

    def forwarded(self, cancel: Callable[[], object]) -> None:
        """Note that the runner has the request.

        Args:
            cancel: Cancels the call to the runner.
        """
        self._cancel_call = cancel

    def abort(self, by: str) -> None:
        """End it with ABORTED.

        Args:
            by: The agent that ends it, for the message.
        """
        if self.aborted_by:
            return
        self.aborted_by = by
        if self._cancel_call is not None:
            self._cancel_call()
        elif self._task is not None:
            self._task.cancel()

    def take_abort(self) -> RequestAbortedError | None:
        """Return the error if the present cancellation is an abort, which is then over."""
        if not self.aborted_by:
            return None
        if self.is_waiting and self._task is not None:
            self._task.uncancel()
        return RequestAbortedError(
            f"the request was ended by {self.aborted_by}; do not retry it automatically"
        )


class Completions:
    """All completions in progress. Belongs to one event loop."""

    def __init__(self) -> None:
        self._present: set[PooledCompletion] = set()
        self._drain_count = 0
        self._is_drained = False

    @contextmanager
    def begin(self, request_id: str) -> Iterator[PooledCompletion]:
        """Register a completion for the duration of its call.

        Raises:
            ShuttingDownError: The pool is draining.
            RequestAbortedError: It was ended on purpose.
        """
        if self._drain_count or self._is_drained:
            raise ShuttingDownError(
                "the pool is draining: it refuses new completions until a model is loaded or "
                "evicted"
            )
        completion = PooledCompletion(request_id)
        self._present.add(completion)
        try:
            yield completion
        except asyncio.CancelledError:
            if error := completion.take_abort():
                raise error from None
            raise
        finally:
            self._present.discard(completion)
            completion.ended.set()

    def abort_waiting(self, request_ids: Collection[str]) -> int:
        """End the completions with these ids that wait for a model; return how many."""
        found = [each for each in self._present if each.is_waiting and not each.aborted_by]
        found = [each for each in found if each.request_id in request_ids]
        for completion in found:
            completion.abort("an Abort")
        return len(found)

    async def drain(self, timeout_seconds: float | None) -> tuple[int, int]:
        """Refuse new completions, and wait for the end of the present ones.

        Cancelling this accepts completions again, unless another drain waits.

        Args:
            timeout_seconds: Time after which the rest is ended; None for no limit.

        Returns:
            How many finished, and how many were ended.
        """
        present = set(self._present)
        self._drain_count += 1
        try:
            try:
                async with asyncio.timeout(timeout_seconds):
                    await _end_of(present)
            except TimeoutError:
                for completion in present:
                    if not completion.ended.is_set():
                        completion.abort("a Drain whose timeout passed")
                await _end_of(present)
        finally:
            self._drain_count -= 1
        self._is_drained = True
        aborted = sum(bool(completion.aborted_by) for completion in present)
        return len(present) - aborted, aborted

    def resume(self) -> None:
        """Accept completions again, unless a drain waits."""
        self._is_drained = False


async def _end_of(completions: Collection[PooledCompletion]) -> None:
    for completion in completions:
        await completion.ended.wait()
