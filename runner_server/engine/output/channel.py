"""Output channels from the engine's thread to the event loop, one per request.

The engine's thread puts deltas and never blocks. The reader takes everything put since its last
read, merged into one delta, so a slow reader gets fewer and larger messages and does not slow down
others. If its backlog grows too large, the engine preempts the request until the reader has caught
up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable

from runner_server.engine.output.base import Channel
from runner_server.engine.types import OutputDelta

_MAX_MERGED_TEXTS = 4096
"""Most token texts in one message. Texts of log probabilities count twice, because they are sent as
bytes too. At 512 bytes each, the longest tokens of common vocabularies, a message stays under
4 MiB."""

_MAX_QUEUED_TEXTS = 4096
"""Token texts in a channel above which the request is preempted; it resumes at half as many."""


class OutputChannel(Channel):
    """Buffer of one request's deltas on their way to the reader.

    Call ``put`` and ``on_drained`` on the engine's thread, ``fail`` on any thread, and everything
    else on the event loop. The engine's thread wakes readers through a ``WakeupCoalescer``.
    """

    def __init__(self) -> None:
        super().__init__()
        self._deltas: deque[OutputDelta] = deque()
        self._queued_texts = 0
        self._on_drained: Callable[[], None] | None = None
        self._is_closed = False

    @property
    def is_full(self) -> bool:
        """True if the reader is far enough behind for the engine to preempt the request."""
        return self._queued_texts > _MAX_QUEUED_TEXTS

    def put(self, delta: OutputDelta) -> None:
        """Add a delta; a delta with ``done`` is the last one. No-op after a fault."""
        with self._lock:
            if self._fault:
                return
            self._has_end = delta.done is not None
            self._deltas.append(delta)
            self._queued_texts += _text_count(delta)

    def on_drained(self, call: Callable[[], None]) -> None:
        """Register a function to call once, on any thread, when the reader has caught up."""
        with self._lock:
            self._on_drained = call
        self._call_if_drained()

    def close(self) -> None:
        """End the stream at once, discarding unread deltas."""
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


def _text_count(delta: OutputDelta) -> int:
    of_tokens = sum(1 + len(entry.others) for entry in delta.logprobs)
    of_prompt = sum(len(part.token_ids) * (1 + part.width) for part in delta.prompt_logprobs)
    return len(delta.token_ids) + 2 * (of_tokens + of_prompt)


def merge(deltas: Iterable[OutputDelta]) -> OutputDelta:
    """Merge consecutive deltas of one stream, at least one."""
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
        prompt_logprobs=tuple(part for delta in deltas for part in delta.prompt_logprobs),
        done=deltas[-1].done,
        merged_texts=tuple(text for delta in deltas for text in delta.token_texts),
    )
