"""One merging slot per stream, between the engine's thread and the event loop.

The engine puts pieces in and never waits; the reader takes all that has come
since, merged into one. A slow reader therefore gets fewer and larger messages,
and costs nobody else anything; when it has too much before it, the engine lets
its row wait until it has read on.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable

from runner_server.engine.types import OutputDelta
from runner_server.errors import RunnerFault

_MAX_MERGED_TEXTS = 4096
"""Token texts in one message. Those beside log probabilities are counted twice, because their
bytes stand beside them: at 512 bytes each, as the longest tokens of usual vocabularies have, it
stays under 4 MiB."""

_MAX_WAITING_TEXTS = 4096
"""Token texts before a reader from which on its row waits, until it has read half of them."""

_MERGE_SECONDS = 0.02
"""How long a piece may wait for others: 50 messages a second are as good as more to a
reader, and each costs both sides some 40 microseconds."""

_MERGE_SECONDS_PER_STREAM = 0.00125
"""The same where many streams share the loop: 800 messages a second in all."""

_MAX_MERGE_SECONDS = 0.04
"""The longest wait, however many streams there are."""


class OutputChannel:
    """The pieces of one completion, on their way to its reader.

    ``put`` and ``on_drained`` belong to the engine's thread, ``fail`` may be called on any
    thread, and the rest belongs to the event loop. The engine's thread calls :meth:`wake`
    through a :class:`WakeupCoalescer`.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pieces: deque[OutputDelta] = deque()
        self._texts = 0
        self._on_read: Callable[[], None] | None = None
        self._fault: RunnerFault | None = None
        self._is_closed = False
        self._ready = asyncio.Event()

    @property
    def is_full(self) -> bool:
        """Whether the reader has so much before it that its row should wait."""
        return self._texts > _MAX_WAITING_TEXTS

    def put(self, piece: OutputDelta) -> None:
        """Adds a piece; one with ``done`` is the last."""
        with self._lock:
            self._pieces.append(piece)
            self._texts += _text_count(piece)

    def on_drained(self, call: Callable[[], None]) -> None:
        """Calls once, on whatever thread, when the reader has read on."""
        with self._lock:
            self._on_read = call
        self._tell_if_read()

    def fail(self, fault: RunnerFault) -> None:
        """End the stream after the deltas already put. Thread-safe; the first fault stays."""
        with self._lock:
            self._fault = self._fault or fault

    def wake(self) -> None:
        """Tells the reader that there is something."""
        self._ready.set()

    def close(self) -> None:
        """Ends it for its reader, who gets nothing more."""
        self._is_closed = True
        self.wake()

    async def pieces(self) -> AsyncIterator[OutputDelta]:
        """Yields merged pieces up to the one with ``done``, or until it is closed.

        Raises:
            RunnerFault: The completion failed.
        """
        while True:
            await self._ready.wait()
            self._ready.clear()
            while not self._is_closed and (batch := self._take()):
                piece = merge(batch)
                yield piece
                if piece.done:
                    return
            if self._is_closed:
                return
            with self._lock:
                if self._fault and not self._pieces:
                    raise self._fault

    def _take(self) -> list[OutputDelta]:
        with self._lock:
            taken: list[OutputDelta] = []
            texts = 0
            while self._pieces and texts < _MAX_MERGED_TEXTS:
                piece = self._pieces.popleft()
                texts += _text_count(piece)
                taken.append(piece)
            self._texts -= texts
        self._tell_if_read()
        return taken

    def _tell_if_read(self) -> None:
        with self._lock:
            if self._texts > _MAX_WAITING_TEXTS // 2:
                return
            call, self._on_read = self._on_read, None
        if call:
            call()


class WakeupCoalescer:
    """Wakes readers: all in one call of the loop, a while after the last time.

    :meth:`publish` belongs to the engine's thread, the rest to the loop.

    Args:
        loop: Where the readers are.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._touched: set[OutputChannel] = set()
        self._urgent: set[OutputChannel] = set()
        # Whether the loop has been told of what is touched.
        self._is_told = False
        self._timer: asyncio.TimerHandle | None = None
        self._woken = 0.0

    def publish(
        self, streams: Iterable[OutputChannel], urgent: Iterable[OutputChannel] = ()
    ) -> None:
        """Has readers woken.

        Args:
            streams: Those to be woken soon.
            urgent: Those to be woken at once: their first piece has come, or their last.
        """
        with self._lock:
            self._touched.update(streams)
            before = len(self._urgent)
            self._urgent.update(urgent)
            is_news = len(self._urgent) > before or (self._touched and not self._is_told)
            if not is_news:
                return
            self._is_told = True
        self._loop.call_soon_threadsafe(self._hear)

    def _hear(self) -> None:
        with self._lock:
            urgent, self._urgent = self._urgent, set()
            self._touched -= urgent
            count = len(self._touched)
            self._is_told = count > 0
        for stream in urgent:
            stream.wake()
        if count and self._timer is None:
            wait = self._woken + _merge_seconds(count) - self._loop.time()
            self._timer = self._loop.call_later(max(0.0, wait), self._wake)

    def _wake(self) -> None:
        self._timer = None
        with self._lock:
            touched, self._touched = self._touched, set()
            self._is_told = False
        self._woken = self._loop.time()
        for stream in touched:
            stream.wake()


def _merge_seconds(streams: int) -> float:
    longer = min(_MAX_MERGE_SECONDS, streams * _MERGE_SECONDS_PER_STREAM)
    return max(_MERGE_SECONDS, longer)


def _text_count(piece: OutputDelta) -> int:
    return len(piece.token_ids) + 2 * sum(1 + len(entry.top) for entry in piece.logprobs)


def merge(pieces: Iterable[OutputDelta]) -> OutputDelta:
    """Joins pieces of one stream, in order; at least one."""
    pieces = list(pieces)
    if len(pieces) == 1:
        return pieces[0]
    token_ids = tuple(token for piece in pieces for token in piece.token_ids)
    return OutputDelta(
        text="".join(piece.text for piece in pieces),
        token_ids=token_ids,
        logprobs=tuple(entry for piece in pieces for entry in piece.logprobs),
        # Progress that tokens have overtaken is no news.
        prefill=None if token_ids else pieces[-1].prefill,
        done=pieces[-1].done,
    )
