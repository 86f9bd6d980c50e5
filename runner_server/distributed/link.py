"""Connection between two ranks, which carries messages as lines."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import suppress

from runner_server.distributed.messages import Message, decode, encode

BEAT_SECONDS = 1.0
"""Interval between heartbeats in each direction."""

SILENCE_SECONDS = 15.0
"""Longest silence of the other side. It is for a machine that fails or hangs: the end of a process
is noticed at once, because its machine closes the connection."""

_MAX_LINE_BYTES = 256 * 2**20
"""Longest line accepted: more than the longest prompt takes."""

_PART_BYTES = 1 << 16


class Link:
    """One end of a connection. Any thread may send; one thread receives.

    Args:
        connection: A connected socket, now owned by the link.
        silence_seconds: Silence after which the other side counts as lost.
    """

    def __init__(self, connection: socket.socket, silence_seconds: float = SILENCE_SECONDS) -> None:
        self._socket = connection
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.settimeout(silence_seconds)
        self._received = bytearray()
        self._lock = threading.Lock()

    def send(self, message: Message) -> None:
        """Send a message.

        Raises:
            OSError: The other side is lost, or does not read.
        """
        self.send_line(encode(message))

    def send_line(self, line: bytes) -> None:
        """Send an encoded message; raise like :meth:`send`."""
        with self._lock:
            self._socket.sendall(line)

    def receive(self) -> Message:
        """Wait for the next message.

        Raises:
            OSError: The other side is lost, or has been silent for too long.
            ValueError: The line is not a message.
        """
        return decode(self._line())

    def messages(self) -> Iterator[Message]:
        """Yield messages until :meth:`receive` raises."""
        while True:
            yield self.receive()

    def _line(self) -> bytes:
        searched = 0
        while (end := self._received.find(b"\n", searched)) < 0:
            searched = len(self._received)
            if searched > _MAX_LINE_BYTES:
                raise ValueError(f"not a message: {searched} bytes without a line end")
            part = self._socket.recv(_PART_BYTES)
            if not part:
                raise ConnectionResetError("the connection was closed")
            self._received += part
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        return line

    def allow_silence(self, seconds: float) -> None:
        """Change the silence after which the other side counts as lost."""
        self._socket.settimeout(seconds)

    def finish(self) -> None:
        """Send nothing more, and go on receiving.

        Closing a connection with unread bytes resets it, and the other side would lose messages
        that it has not read yet.
        """
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close the connection, waking receivers on both sides."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            # The other side closed first.
            return
        finally:
            self._socket.close()
