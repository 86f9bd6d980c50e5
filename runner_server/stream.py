"""One merging slot per stream, between the engine's thread and the event loop.

The engine puts pieces in and never waits; the reader takes all that has come
since, merged into one. A slow reader therefore gets fewer and larger messages,
and costs nobody else anything.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterable

from runner_server.errors import RunnerFault
from runner_server.messages import Piece

_MAX_MERGED_TEXTS = 4096
"""Token texts in one message, those beside log probabilities counted too: at 512 bytes
each, as the longest tokens of usual vocabularies have, it stays under 4 MiB."""


class Stream:
    """The pieces of one completion, on their way to its reader.

    ``put`` and ``fail`` belong to the engine's thread, the rest to the loop. The
    engine calls :meth:`wake` through the loop, once per step for all streams.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pieces: deque[Piece] = deque()
        self._fault: RunnerFault | None = None
        self._ready = asyncio.Event()

    def put(self, piece: Piece) -> None:
        """Adds a piece; one with ``done`` is the last."""
        with self._lock:
            self._pieces.append(piece)

    def fail(self, fault: RunnerFault) -> None:
        """Ends the stream; pieces not yet read are still delivered before it."""
        with self._lock:
            self._fault = fault

    def wake(self) -> None:
        """Tells the reader that there is something."""
        self._ready.set()

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yields merged pieces up to the one with ``done``.

        Raises:
            RunnerFault: The completion failed.
        """
        while True:
            await self._ready.wait()
            self._ready.clear()
            while batch := self._take():
                piece = merge(batch)
                yield piece
                if piece.done:
                    return
            with self._lock:
                if self._fault and not self._pieces:
                    raise self._fault

    def _take(self) -> list[Piece]:
        with self._lock:
            taken: list[Piece] = []
            texts = 0
            while self._pieces and texts < _MAX_MERGED_TEXTS:
                piece = self._pieces.popleft()
                texts += len(piece.token_ids) + sum(1 + len(e.top) for e in piece.logprobs)
                taken.append(piece)
            return taken


def merge(pieces: Iterable[Piece]) -> Piece:
    """Joins pieces of one stream, in order; at least one."""
    pieces = list(pieces)
    if len(pieces) == 1:
        return pieces[0]
    token_ids = tuple(token for piece in pieces for token in piece.token_ids)
    return Piece(
        text="".join(piece.text for piece in pieces),
        token_ids=token_ids,
        logprobs=tuple(entry for piece in pieces for entry in piece.logprobs),
        # Progress that tokens have overtaken is no news.
        prefill=None if token_ids else pieces[-1].prefill,
        done=pieces[-1].done,
    )
