"""A connection between two ranks: lines of JSON, each a list that begins with its kind."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

BEAT_SECONDS = 1.0
"""How often each side says that it is there."""

SILENCE_SECONDS = 15.0
"""How long the other side may be silent. A process that ends is seen at once, because its
machine closes the connection; this is for a machine that ends, or hangs."""

_MAX_LINE_BYTES = 256 * 2**20
"""More than the longest prompt takes."""

_PART_BYTES = 1 << 16


class Link:
    """One end of a connection. Any thread may send; one thread receives.

    Args:
        connection: A connected socket, which belongs to the link from now on.
        silence_seconds: After how long without a word the other side counts as gone.
    """

    def __init__(self, connection: socket.socket, silence_seconds: float = SILENCE_SECONDS) -> None:
        self._socket = connection
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.settimeout(silence_seconds)
        self._received = bytearray()
        self._lock = threading.Lock()

    def send(self, *message: object) -> None:
        """Sends a message.

        Raises:
            OSError: The other side is gone, or takes nothing any more.
        """
        self.send_line(encode(*message))

    def send_line(self, line: bytes) -> None:
        """Sends what :func:`encode` made; raises like :meth:`send`."""
        with self._lock:
            self._socket.sendall(line)

    def receive(self) -> list[Any]:
        """Waits for the next message.

        Raises:
            OSError: The other side is gone, or has been silent for too long.
            ValueError: What came is no message.
        """
        message = json.loads(self._line())
        if not (isinstance(message, list) and message):
            raise ValueError(f"no message: {str(message)[:80]}")
        return message

    def messages(self) -> Iterator[list[Any]]:
        """Messages as they come; ends by what :meth:`receive` raises."""
        while True:
            yield self.receive()

    def _line(self) -> bytes:
        searched = 0
        while (end := self._received.find(b"\n", searched)) < 0:
            searched = len(self._received)
            if searched > _MAX_LINE_BYTES:
                raise ValueError(f"no message: {searched} bytes without an end")
            part = self._socket.recv(_PART_BYTES)
            if not part:
                raise ConnectionResetError("the connection was closed")
            self._received += part
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        return line

    def allow_silence(self, seconds: float) -> None:
        """Changes how long the other side may be silent."""
        self._socket.settimeout(seconds)

    def close(self) -> None:
        """Closes it; whoever receives on either side is woken."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            # The other side was faster.
            return
        finally:
            self._socket.close()


def encode(*message: object) -> bytes:
    """A message as it goes over a link."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"
