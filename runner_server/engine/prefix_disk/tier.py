"""The tier on disk, on the engine's thread: choice of the blocks to write and to read.

Blocks are written while the entries are in memory, from where they are copied when the writer has
room and the engine the time: a block after each work item, and all that is left when the engine
has nothing else to do. Nothing is written when an entry is evicted or the process ends, because a
killed process could not do so.

Blocks are read back into the prefix cache in memory, one by one, as work items of the prompt that
needs them.
"""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from runner_server.engine.prefix_cache import PrefixCache
from runner_server.engine.prefix_disk.names import BLOCK_TOKENS, block_names
from runner_server.engine.prefix_disk.store import BlockStore

S = TypeVar("S")
T = TypeVar("T")

_READ_AHEAD = 2
_QUEUED = 1

BUFFERED_BLOCKS = _READ_AHEAD + _QUEUED + 1
"""Most blocks outside of the prefix cache: read ahead, waiting to be written, and being written."""

BUFFERED_TOKENS = BUFFERED_BLOCKS * BLOCK_TOKENS

_PATIENCE_SECONDS = 5.0
"""Longest wait for one block, after which the prompt is evaluated."""

_PAUSE_SECONDS = 60.0
"""Time without reads after one that took longer, so that not every prompt waits for a disk that
hangs."""

_MOST_WAITING = 256
"""Most sequences that wait to be written; the oldest are dropped."""


class BlockOps(Protocol[S]):
    """Operations on segments of :data:`BLOCK_TOKENS` tokens."""

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        ...

    def cut(self, segment: S, start: int, end: int) -> S:
        """Copy a part of a segment."""
        ...

    def encode(self, segments: Sequence[S]) -> bytes | None:
        """Return the bytes of the segments of a block; None unless all numbers are finite."""
        ...

    def decode(self, payload: bytearray) -> S:
        """Return the segment with these bytes."""
        ...


@dataclass
class _Waiting:
    """A sequence of blocks to write, from ``position`` on."""

    tokens: array[int]
    salt: str
    names: list[str]
    position: int = 0
    has_written: bool = False


@dataclass
class _Read:
    """A pending read of a block."""

    block: Future[bytearray | None]
    began: float = field(default_factory=time.monotonic)


@dataclass
class _Promotion:
    """The blocks of a prompt on their way to memory, from ``position`` on."""

    row: int
    tokens: array[int]
    salt: str
    names: list[str]
    position: int
    reads: deque[_Read] = field(default_factory=deque)


class DiskTier(Generic[S, T]):
    """Copies blocks between the prefix cache in memory and a directory.

    Args:
        cache: The prefix cache in memory, whose prefixes can be cut anywhere.
        ops: Operations on blocks.
        store: The directory.
        model_key: Digest of all that determines the keys and values of given tokens.
    """

    def __init__(
        self, cache: PrefixCache[S, T], ops: BlockOps[S], store: BlockStore, model_key: bytes
    ) -> None:
        self._cache = cache
        self._ops = ops
        self._store = store
        self._model_key = model_key
        self._waiting: dict[int, _Waiting] = {}
        self._promotion: _Promotion | None = None
        self._paused_until = 0.0

    # -- writing -----------------------------------------------------------------

    def note(self, row: int, tokens: Sequence[int], salt: str) -> None:
        """Note the tokens of a row in the prefix cache for a later write.

        Args:
            row: Id of the row, whose earlier tokens are the beginning of these.
            tokens: The tokens.
            salt: The tree with the tokens.
        """
        whole = len(tokens) // BLOCK_TOKENS * BLOCK_TOKENS
        before = self._waiting.pop(row, None)
        if whole:
            run = array("i", tokens[:whole])
            position = before.position if before else 0
            names = block_names(self._model_key, salt, run)
            self._waiting[row] = _Waiting(run, salt, names, position)
        if len(self._waiting) > _MOST_WAITING:
            del self._waiting[next(iter(self._waiting))]

    def save_some(self, wait_seconds: float) -> bool:
        """Copy the next block for the writer, if the queue has room.

        Args:
            wait_seconds: Longest wait for the writer.

        Returns:
            False if there is nothing to do.
        """
        while self._waiting:
            row, sequence = next(iter(self._waiting.items()))
            self._skip_stored(sequence)
            if sequence.position == len(sequence.names):
                self._store.touch(sequence.names, is_new=sequence.has_written)
                del self._waiting[row]
                continue
            if self._store.is_paused:
                return False
            if self._store.wait_room(wait_seconds) and not self._save_next(sequence):
                del self._waiting[row]
            return True
        return False

    def drop_noted(self) -> None:
        """Write none of the noted sequences."""
        self._waiting.clear()

    def forget(self, tokens: Sequence[int], salt: str) -> None:
        """Remove the blocks of a failed prompt, shared ones included."""
        self._store.remove(block_names(self._model_key, salt, array("i", tokens)))

    def end(self, row: int, *, has_failed: bool = False) -> None:
        """Forget a row whose prompt needs no more blocks.

        Args:
            row: Id of the row.
            has_failed: Whether the row's tokens must not be written any more.
        """
        if self._promotion and self._promotion.row == row:
            self._stop_promotion()
        if has_failed:
            self._waiting.pop(row, None)

    def _skip_stored(self, sequence: _Waiting) -> None:
        names = sequence.names
        while sequence.position < len(names) and names[sequence.position] in self._store:
            sequence.position += 1

    def _save_next(self, sequence: _Waiting) -> bool:
        """Copy the next block of a sequence; return False once evicted from memory."""
        payload = None
        try:
            payload = self._payload(sequence)
        finally:
            if payload is None:
                self._store.cancel_room()
        if payload is None:
            return False
        self._store.write(sequence.names[sequence.position], payload)
        sequence.position += 1
        sequence.has_written = True
        return True

    def _payload(self, sequence: _Waiting) -> bytes | None:
        """Return the bytes of the next block; None if evicted or not finite."""
        start = sequence.position * BLOCK_TOKENS
        segments = self._cache.peek(sequence.tokens[: start + BLOCK_TOKENS], start, sequence.salt)
        payload = self._ops.encode(segments) if segments else None
        return payload if payload and len(payload) == self._ops.block_bytes else None

    # -- reading -----------------------------------------------------------------

    def find(self, tokens: Sequence[int], salt: str) -> int:
        """Return the number of leading tokens of a prompt on disk; 0 while the disk hangs."""
        if len(tokens) < BLOCK_TOKENS or self._is_paused:
            return 0
        return BLOCK_TOKENS * len(self._stored_names(array("i", tokens), salt))

    def promote(self, row: int, tokens: Sequence[int], salt: str, wait_seconds: float) -> bool:
        """Copy the next block of a prompt from disk to the prefix cache in memory.

        Args:
            row: Id of the row.
            tokens: The prompt.
            salt: The tree of the prompt.
            wait_seconds: Longest wait for the disk; the next call goes on waiting.

        Returns:
            False when the prompt has no further block, or memory no room for it, or the disk hangs.
        """
        if self._is_paused:
            return False
        if self._promotion is None or self._promotion.row != row:
            self._stop_promotion()
            self._promotion = self._begin(row, array("i", tokens), salt)
        is_unfinished = self._advance(self._promotion, wait_seconds)
        if not is_unfinished:
            self._stop_promotion()
        return is_unfinished

    @property
    def _is_paused(self) -> bool:
        return time.monotonic() < self._paused_until

    def _begin(self, row: int, tokens: array[int], salt: str) -> _Promotion:
        held = self._cache.match(tokens, salt).usable
        names = self._stored_names(tokens, salt)
        return _Promotion(row, tokens, salt, names, held // BLOCK_TOKENS)

    def _stored_names(self, tokens: array[int], salt: str) -> list[str]:
        names = block_names(self._model_key, salt, tokens)
        count = next((i for i, name in enumerate(names) if name not in self._store), len(names))
        return names[:count]

    def _advance(self, promotion: _Promotion, wait_seconds: float) -> bool:
        ahead = promotion.position + len(promotion.reads)
        last = promotion.position + _READ_AHEAD
        promotion.reads += [_Read(self._store.read(name)) for name in promotion.names[ahead:last]]
        if not promotion.reads:
            return False
        read = promotion.reads[0]
        try:
            payload = read.block.result(wait_seconds)
        except TimeoutError:
            now = time.monotonic()
            if now - read.began < _PATIENCE_SECONDS:
                return True
            self._paused_until = now + _PAUSE_SECONDS
            return False
        promotion.reads.popleft()
        if payload is None or not self._insert(promotion, payload):
            return False
        promotion.position += 1
        return promotion.position < len(promotion.names)

    def _insert(self, promotion: _Promotion, payload: bytearray) -> bool:
        """Insert a block into the prefix cache; return False without room."""
        start = promotion.position * BLOCK_TOKENS
        run = promotion.tokens[: start + BLOCK_TOKENS]
        held = self._cache.match(run, promotion.salt).usable
        if held < start:
            # Evicted since the previous block.
            return False

        def segment(first: int, last: int) -> S:
            block = self._ops.decode(payload)
            if last - first == BLOCK_TOKENS:
                return block
            return self._ops.cut(block, first - start, last - start)

        token_bytes = self._ops.block_bytes // BLOCK_TOKENS
        self._cache.insert(run, segment, salt=promotion.salt, token_bytes=token_bytes)
        return self._cache.match(run, promotion.salt).usable == len(run)

    def _stop_promotion(self) -> None:
        if self._promotion:
            for read in self._promotion.reads:
                read.block.cancel()
            self._store.touch(self._promotion.names)
            self._promotion = None
