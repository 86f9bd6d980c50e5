"""Output channels: one merging slot per request, between the engine's thread and the event loop.

The engine's thread puts deltas and never blocks; the reader takes everything that has arrived
since its last read, merged into one delta. A slow reader therefore gets fewer and larger
messages and does not slow down others. When its backlog is too large, the engine preempts the
request until the reader has caught up.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable

from runner_server.engine.types import OutputDelta
from runner_server.errors import RunnerFault

_MAX_MERGED_TEXTS = 4096
"""Most token texts in one message. Texts beside log probabilities count twice because their bytes
are sent as well: at 512 bytes each, the longest tokens of common vocabularies, a message stays
under 4 MiB."""

_MAX_QUEUED_TEXTS = 4096
"""Token texts in a channel beyond which its request is preempted, until half of them are read."""

_MERGE_SECONDS = 0.02
"""How long a delta may wait for others: a reader does not notice more than 50 messages a second,
and each message costs both sides about 40 microseconds."""

_MERGE_SECONDS_PER_STREAM = 0.00125
"""The same where many streams share the event loop: 800 messages a second in total."""

_MAX_MERGE_SECONDS = 0.04
"""The longest wait for any number of streams."""


class OutputChannel:
    """The deltas of one request on the way to the reader.

    ``put`` and ``on_drained`` belong to the engine's thread, ``fail`` may be called on any
    thread, and the rest belongs to the event loop. The engine's thread calls :meth:`wake`
    through a :class:`WakeupCoalescer`.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._deltas: deque[OutputDelta] = deque()
        self._queued_texts = 0
        self._on_drained: Callable[[], None] | None = None
        self._fault: RunnerFault | None = None
        self._is_closed = False
        self._ready = asyncio.Event()

    @property
    def is_full(self) -> bool:
        """True if the reader is so far behind that backpressure should preempt the request."""
        return self._queued_texts > _MAX_QUEUED_TEXTS

    def put(self, delta: OutputDelta) -> None:
        """Add a delta; a delta with ``done`` is the last one."""
        with self._lock:
            self._deltas.append(delta)
            self._queued_texts += _text_count(delta)

    def on_drained(self, call: Callable[[], None]) -> None:
        """Call a function once, on any thread, when the reader has caught up."""
        with self._lock:
            self._on_drained = call
        self._call_if_drained()

    def fail(self, fault: RunnerFault) -> None:
        """End the stream after the deltas already put. Thread-safe; the first fault stays."""
        with self._lock:
            self._fault = self._fault or fault

    def wake(self) -> None:
        """Wake the reader."""
        self._ready.set()

    def close(self) -> None:
        """End the stream at once; the reader gets nothing more."""
        self._is_closed = True
        self.wake()

    async def deltas(self) -> AsyncIterator[OutputDelta]:
        """Yield merged deltas up to the one with ``done``, or until the channel is closed.

        Raises:
            RunnerFault: The request failed.
        """
        while True:
            await self._ready.wait()
            self._ready.clear()
            while not self._is_closed and (taken := self._take()):
                delta = merge(taken)
                yield delta
                if delta.done:
                    return
            if self._is_closed:
                return
            with self._lock:
                if self._fault and not self._deltas:
                    raise self._fault

    def _take(self) -> list[OutputDelta]:
        with self._lock:
            taken: list[OutputDelta] = []
            texts = 0
            while self._deltas and texts < _MAX_MERGED_TEXTS:
                delta = self._deltas.popleft()
                texts += _text_count(delta)
                taken.append(delta)
            self._queued_texts -= texts
        self._call_if_drained()
        return taken

    def _call_if_drained(self) -> None:
        with self._lock:
            if self._queued_texts > _MAX_QUEUED_TEXTS // 2:
                return
            call, self._on_drained = self._on_drained, None
        if call:
            call()


class WakeupCoalescer:
    """Wakes readers on the event loop, many in one call and not too often.

    :meth:`publish` belongs to the engine's thread, the rest to the event loop.

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
        self._pending: set[OutputChannel] = set()
        self._urgent: set[OutputChannel] = set()
        # Whether a call on the event loop for the pending channels is scheduled.
        self._is_notified = False
        self._timer: asyncio.TimerHandle | None = None
        self._last_wakeup = 0.0

    def publish(
        self, channels: Iterable[OutputChannel], urgent: Iterable[OutputChannel] = ()
    ) -> None:
        """Schedule the wakeup of readers.

        Args:
            channels: Channels whose readers may wait for a merged delta.
            urgent: Channels whose readers are woken at once: for a first or a last delta.
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

    A process that gives up on a hanging engine's thread closes the loop before the thread ends.
    """
    try:
        loop.call_soon_threadsafe(call)
    except RuntimeError:
        if not loop.is_closed():
            raise


def _merge_seconds(streams: int) -> float:
    longer = min(_MAX_MERGE_SECONDS, streams * _MERGE_SECONDS_PER_STREAM)
    return max(_MERGE_SECONDS, longer)


def _text_count(delta: OutputDelta) -> int:
    return len(delta.token_ids) + 2 * sum(1 + len(entry.top) for entry in delta.logprobs)


def merge(deltas: Iterable[OutputDelta]) -> OutputDelta:
    """Join consecutive deltas of one stream; at least one."""
    deltas = list(deltas)
    if len(deltas) == 1:
        return deltas[0]
    token_ids = tuple(token for delta in deltas for token in delta.token_ids)
    return OutputDelta(
        text="".join(delta.text for delta in deltas),
        token_ids=token_ids,
        logprobs=tuple(entry for delta in deltas for entry in delta.logprobs),
        # Prefill progress is obsolete once there are tokens.
        prefill=None if token_ids else deltas[-1].prefill,
        done=deltas[-1].done,
    )
