"""Rank 0's connections to the other ranks: joining, answers, heartbeats and losses."""

from __future__ import annotations

import logging
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from runner_server.distributed.link import BEAT_SECONDS, SILENCE_SECONDS, Link
from runner_server.distributed.messages import (
    AskStop,
    Beat,
    Close,
    FromLeader,
    Hello,
    LoadFailed,
    LoadRead,
    Memory,
    Message,
    encode,
)
from runner_server.engine.backend import BackendLost
from runner_server.engine.types import Rank

logger = logging.getLogger(__name__)

_HELLO_SECONDS = 5.0
"""Longest wait for the first message of a new connection."""

_LOST_SECONDS = 2.0
"""Longest wait, after an MLX error, to learn that another rank is lost."""


@dataclass
class _Follower:
    link: Link
    rank: Rank
    answers: queue.SimpleQueue[LoadRead | LoadFailed] = field(default_factory=queue.SimpleQueue)


class Hub:
    """Connections of rank 0 to the other ranks.

    Args:
        host: Address of this machine that the other ranks can reach.
        size: Number of ranks, including this one.

    Raises:
        OSError: The address cannot be listened on.
    """

    def __init__(self, host: str, size: int) -> None:
        self._size = size
        self._secret = secrets.token_hex(32)
        family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
        self._listener = socket.create_server((host, 0), family=family)
        self._followers: list[_Follower] = []
        self._on_lost: Callable[[str], object] | None = None
        self._on_stop: Callable[[], object] | None = None
        self._lock = threading.Lock()
        self._lost = threading.Event()
        self._lost_text = ""
        self._is_closing = False

    @property
    def address(self) -> list[Any]:
        """Host, port and secret with which followers connect."""
        return [*self._listener.getsockname()[:2], self._secret]

    def gather(self, traits: Sequence[str], timeout_seconds: float) -> None:
        """Wait for the other ranks to connect, then start the reading threads.

        Args:
            traits: Properties that must be the same on all ranks, such as versions.
            timeout_seconds: Longest wait for all ranks together.

        Raises:
            TimeoutError: Some ranks did not connect in time.
            ValueError: A rank has different traits.
        """
        deadline = time.monotonic() + timeout_seconds
        with self._listener:
            while len(self._followers) < self._size - 1:
                self._listener.settimeout(max(0.001, deadline - time.monotonic()))
                try:
                    connection, _ = self._listener.accept()
                except TimeoutError:
                    missing = self._size - 1 - len(self._followers)
                    raise TimeoutError(
                        f"{missing} of {self._size} ranks did not connect within "
                        f"{timeout_seconds:.0f} s; see their logs"
                    ) from None
                self._admit(connection, list(traits))
        self._followers.sort(key=lambda follower: follower.rank.rank)
        for follower in self._followers:
            threading.Thread(target=self._listen, args=(follower,), daemon=True).start()
        threading.Thread(target=self._beat, name="beat", daemon=True).start()

    def _admit(self, connection: socket.socket, traits: list[str]) -> None:
        link = Link(connection, _HELLO_SECONDS)
        try:
            hello = link.receive()
        except (OSError, ValueError):
            link.close()
            return
        if not (isinstance(hello, Hello) and self._is_secret(hello.secret)):
            link.close()
            return
        if (theirs := list(hello.traits)) != traits:
            link.close()
            raise ValueError(
                f"rank {hello.rank} on {hello.host} has {theirs} and rank 0 has {traits}"
            )
        link.allow_silence(SILENCE_SECONDS)
        rank = Rank(hello.rank, hello.host, hello.pid, hello.device)
        self._followers.append(_Follower(link, rank))

    def _is_secret(self, text: object) -> bool:
        return secrets.compare_digest(str(text).encode(), self._secret.encode())

    def watch(self, on_lost: Callable[[str], object], on_stop: Callable[[], object]) -> None:
        """Set the callbacks for a lost rank and for a rank asked to stop.

        They are called on the hub's threads, or here if a rank is lost already: ``on_lost`` at most
        once, with a description of the lost rank, and ``on_stop`` for each request.
        """
        with self._lock:
            self._on_lost, self._on_stop = on_lost, on_stop
            gone = self._lost.is_set()
        if gone:
            on_lost(self._lost_text)

    @property
    def others(self) -> list[Rank]:
        """The other ranks, with the memory last reported by each."""
        return [follower.rank for follower in self._followers]

    def broadcast(self, message: FromLeader) -> None:
        """Send a message to every other rank.

        Raises:
            BackendLost: A rank is lost.
        """
        line = encode(message)
        for follower in self._followers:
            try:
                follower.link.send_line(line)
            except OSError as error:
                self._lose(follower, error)
        if self._lost.is_set():
            raise BackendLost(self._lost_text)

    def answer(self, index: int, timeout_seconds: float) -> LoadRead | LoadFailed | None:
        """Return a follower's answer to a load; None on timeout.

        Args:
            index: The follower's index in :attr:`others`.
            timeout_seconds: Longest wait.

        Raises:
            BackendLost: A rank is lost.
        """
        try:
            return self._followers[index].answers.get(timeout=timeout_seconds)
        except queue.Empty:
            if self._lost.is_set():
                raise BackendLost(self._lost_text) from None
            return None

    def lost(self, error: Exception) -> BackendLost:
        """Return the exception for an MLX error on this rank, after which no rank can continue.

        The usual cause of such an error is the loss of another rank.
        """
        if self._lost.wait(_LOST_SECONDS):
            return BackendLost(self._lost_text)
        # No other rank is lost, so this rank is the cause.
        self._is_closing = True
        self._close_links()
        return BackendLost(
            f"rank 0 failed ({type(error).__name__}: {error}), so the other ranks cannot continue"
        )

    def close(self) -> None:
        """End the other ranks."""
        if self._lost.is_set():
            return
        self._is_closing = True
        try:
            self.broadcast(Close())
        except BackendLost:
            logger.warning("%s, during the shutdown", self._lost_text)
        # The threads that listen close each connection once the follower has closed its own.
        for follower in self._followers:
            follower.link.finish()

    def _listen(self, follower: _Follower) -> None:
        try:
            for message in follower.link.messages():
                self._handle(follower, message)
        except (OSError, ValueError) as error:
            if self._is_closing:
                follower.link.close()
            self._lose(follower, error)

    def _handle(self, follower: _Follower, message: Message) -> None:
        match message:
            case Memory():
                follower.rank = _with_memory(follower.rank, message)
            case AskStop():
                self._ask_stop(follower.rank)
            case LoadRead() | LoadFailed():
                follower.answers.put(message)
            case _:
                raise ValueError(f"a follower does not send {message}")

    def _ask_stop(self, rank: Rank) -> None:
        logger.info("stopping, because rank %d on %s was asked to stop", rank.rank, rank.host)
        if self._on_stop:
            self._on_stop()

    def _lose(self, follower: _Follower, error: Exception) -> None:
        with self._lock:
            if self._is_closing or self._lost.is_set():
                return
            rank = follower.rank
            self._lost_text = (
                f"rank {rank.rank} (process {rank.pid} on {rank.host}) is lost: {error}; the model "
                "is split among all ranks, so all of them exit; see the log of that rank, and use "
                "another runner"
            )
            self._lost.set()
            on_lost = self._on_lost
        logger.critical("%s", self._lost_text)
        self._close_links()
        if on_lost:
            on_lost(self._lost_text)

    def _close_links(self) -> None:
        """Close the connections, which ends the other ranks."""
        for follower in self._followers:
            follower.link.close()

    def _beat(self) -> None:
        while not (self._is_closing or self._lost.wait(BEAT_SECONDS)):
            for follower in self._followers:
                try:
                    follower.link.send(Beat())
                except OSError as error:
                    self._lose(follower, error)


def _with_memory(rank: Rank, message: Memory) -> Rank:
    return replace(
        rank,
        memory=message.counters,
        process_bytes=message.process_bytes,
        limit_bytes=message.limit_bytes,
    )
