"""Coalesced wakeups of the readers of output channels."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable

from runner_server.engine.output.base import Channel

_MERGE_SECONDS = 0.02
"""Time that a delta may wait to be merged. People do not notice more than 50 messages a second,
and each message costs both sides about 40 microseconds."""

_MERGE_SECONDS_PER_STREAM = 0.00125
"""Time per stream if many streams share the event loop: 800 messages a second in total."""

_MAX_MERGE_SECONDS = 0.04
"""Longest wait, for any number of streams."""


class WakeupCoalescer:
    """Wakes readers on the event loop, many per call and at most 50 times a second unless urgent.

    Call :meth:`publish` on the engine's thread. The rest runs on the event loop.

    For example, with 8 streams and steps of 5 ms, the last wakeup at 0 ms:

    1. At 5 ms the first step publishes 8 channels, and one call on the event loop sets a timer for
       20 ms.
    2. The steps at 10 and 15 ms add to the same pending channels and call nothing.
    3. At 12 ms a ninth stream publishes its first delta as urgent: one more call wakes that reader
       at once, and leaves the timer.
    4. At 20 ms the timer wakes the 8 readers. Each takes one delta with the tokens of 3 steps.

    Args:
        loop: The event loop of the readers.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._pending: set[Channel] = set()
        self._urgent: set[Channel] = set()
        # Whether a call on the event loop for the pending channels is scheduled.
        self._is_notified = False
        self._timer: asyncio.TimerHandle | None = None
        self._last_wakeup = 0.0

    def publish(self, channels: Iterable[Channel], urgent: Iterable[Channel] = ()) -> None:
        """Schedule the wakeup of readers.

        Args:
            channels: Channels whose readers may wait for a merged delta.
            urgent: Channels whose readers are woken at once, for a first or a last delta.
        """
        with self._lock:
            self._pending.update(channels)
            before = len(self._urgent)
            self._urgent.update(urgent)
            is_new = len(self._urgent) > before or (self._pending and not self._is_notified)
            if not is_new:
                return
            self._is_notified = True
        call_on_loop(self._loop, self._on_notified)

    def _on_notified(self) -> None:
        with self._lock:
            urgent, self._urgent = self._urgent, set()
            self._pending -= urgent
            count = len(self._pending)
            self._is_notified = count > 0
        for channel in urgent:
            channel.wake()
        if count and self._timer is None:
            delay = self._last_wakeup + _merge_seconds(count) - self._loop.time()
            self._timer = self._loop.call_later(max(0.0, delay), self._wake_pending)

    def _wake_pending(self) -> None:
        self._timer = None
        with self._lock:
            pending, self._pending = self._pending, set()
            self._is_notified = False
        self._last_wakeup = self._loop.time()
        for channel in pending:
            channel.wake()


def call_on_loop(loop: asyncio.AbstractEventLoop, call: Callable[[], object]) -> None:
    """Call a function on an event loop. No-op once the loop is closed.

    A process whose engine hangs closes the loop while the engine's thread still exists.
    """
    try:
        loop.call_soon_threadsafe(call)
    except RuntimeError:
        if not loop.is_closed():
            raise


def _merge_seconds(streams: int) -> float:
    longer = min(_MAX_MERGE_SECONDS, streams * _MERGE_SECONDS_PER_STREAM)
    return max(_MERGE_SECONDS, longer)
