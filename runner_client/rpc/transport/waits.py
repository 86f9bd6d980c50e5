"""Timeouts for the next message of a stream and for the progress of a load.

The rules are shared by the sync and the asyncio client: no function here reads a clock or waits.
Callers pass the time as ``time.monotonic()`` seconds.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from runner_client.errors import RunnerTimeoutError

if TYPE_CHECKING:
    from runner_client.types import CompletionChunk, Status, Timeouts


class StreamTimer:
    """Timer for the next message of a stream.

    The first-token timeout runs from the first wait until the first token. The idle timeout
    applies in addition once any message has arrived. Time that the reader spends between two
    reads does not count against the idle timeout.
    """

    def __init__(self, timeouts: Timeouts) -> None:
        self._timeouts = timeouts
        self._first_token_by: float | None = None
        self._has_message = False
        self._has_token = False

    def deadline(self, now: float) -> float:
        """Return the deadline of a wait beginning now; infinity if unlimited."""
        idle = now + _limit(self._timeouts.idle_seconds) if self._has_message else math.inf
        return idle if self._has_token else min(idle, self._first_token_limit(now))

    def _first_token_limit(self, now: float) -> float:
        if self._first_token_by is None:
            self._first_token_by = now + _limit(self._timeouts.first_token_seconds)
        return self._first_token_by

    def received(self, chunk: CompletionChunk) -> None:
        """Record a received message."""
        self._has_message = True
        self._has_token = self._has_token or bool(chunk.content or chunk.token_ids)

    def expired(self, now: float) -> RunnerTimeoutError:
        """Return the error for a wait ending now without a message."""
        if self._has_token or now < self._first_token_limit(now):
            return _stream_error("idle", "no message", self._timeouts.idle_seconds)
        return _stream_error("first_token", "no token", self._timeouts.first_token_seconds)


class WatchTimer:
    """Timer for the next message of a watch.

    The first message has the deadline of a call. The others have one only if the runner was asked
    for an interval: the interval and the time of a call.
    """

    def __init__(self, timeouts: Timeouts, interval_seconds: float | None) -> None:
        self._seconds = timeouts.call_seconds
        self._interval_seconds = interval_seconds
        self._has_message = False

    def deadline(self, now: float) -> float:
        """Return the deadline of a wait beginning now; infinity if unlimited."""
        return now + self._limit_seconds

    @property
    def _limit_seconds(self) -> float:
        interval = _limit(self._interval_seconds) if self._has_message else 0.0
        return self._seconds + interval

    def received(self) -> None:
        """Record a received message."""
        self._has_message = True

    def expired(self) -> RunnerTimeoutError:
        """Return the error for a wait without a message."""
        return RunnerTimeoutError(
            f"the watch was cancelled: no status for {self._limit_seconds:g} s. The runner or the "
            f"connection hangs, or raise Timeouts.call_seconds",
            phase="idle" if self._has_message else "call",
            timeout_seconds=self._limit_seconds,
        )


class LoadWatch:
    """Detector for a load without progress."""

    def __init__(self, timeout_seconds: float | None, now: float) -> None:
        self._timeout_seconds = timeout_seconds
        self._moved_at = now
        self._seen: tuple[object, ...] | None = None

    def observe(self, status: Status | None, now: float) -> None:
        """Record a status; None if the request failed.

        Raises:
            RunnerTimeoutError: The load made no progress for too long.
        """
        if status is not None:
            self._note(status, now)
        still_seconds = now - self._moved_at
        if still_seconds >= _limit(self._timeout_seconds):
            raise RunnerTimeoutError(
                f"the load made no progress for {still_seconds:.0f} s (at "
                f"{self._seen[1] if self._seen else 0} %). Look at the runner's log, or raise "
                f"Timeouts.load_seconds",
                phase="load",
                timeout_seconds=self._timeout_seconds,
            )

    def _note(self, status: Status, now: float) -> None:
        seen = (status.state, status.progress)
        if seen != self._seen:
            self._seen, self._moved_at = seen, now
        elif status.last_progress_age_seconds is not None:
            self._moved_at = max(self._moved_at, now - status.last_progress_age_seconds)


def _stream_error(
    phase: Literal["first_token", "idle"], what: str, seconds: float | None
) -> RunnerTimeoutError:
    return RunnerTimeoutError(
        f"the completion was cancelled: {what} for {_limit(seconds):g} s. Look at the runner's "
        f"status, or raise Timeouts.{phase}_seconds",
        phase=phase,
        timeout_seconds=seconds,
    )


def _limit(seconds: float | None) -> float:
    return math.inf if seconds is None else seconds
