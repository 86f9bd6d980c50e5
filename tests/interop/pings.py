"""TCP relay in front of a server, with a count of pings out of silence."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import closing, suppress

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_HEADER_BYTES = 9
_PING, _ACK = 0x6, 0x1
_ANSWERS = frozenset({0x4, 0x8})
"""SETTINGS and WINDOW_UPDATE frames."""

SILENCE_SECONDS = 5.0


class Pings:
    """Counter of a connection's pings after a silence of ``SILENCE_SECONDS``.

    Clients also ping to measure round trips, but then next to data.
    """

    def __init__(self) -> None:
        self.count = 0
        self._buffer = bytearray()
        self._skip = len(_PREFACE)
        self._last = 0.0

    def feed(self, data: bytes, now: float) -> None:
        """Count the pings in the next bytes from the client.

        Args:
            data: The bytes, cut anywhere.
            now: The time of arrival, in seconds.
        """
        self._buffer += data
        while self._drop() and len(self._buffer) >= _HEADER_BYTES:
            length, kind, flags = int.from_bytes(self._buffer[:3]), *self._buffer[3:5]
            self._skip = _HEADER_BYTES + length
            if kind in _ANSWERS or (kind == _PING and flags & _ACK):
                # These do not end a silence: grpcio sends pending ones with its next ping.
                continue
            if kind == _PING:
                self.count += now - self._last >= SILENCE_SECONDS
            self._last = now

    def _drop(self) -> bool:
        """Drop the bytes already read; return whether a frame begins at the next byte."""
        dropped = min(self._skip, len(self._buffer))
        del self._buffer[:dropped]
        self._skip -= dropped
        return self._skip == 0


class Relay:
    """Relay from a loopback port to the server's port.

    Args:
        port: The server's port on 127.0.0.1.

    Attributes:
        address: The address for clients.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._connections: list[Pings] = []
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, name="relay", daemon=True).start()

    @property
    def pings(self) -> int:
        """The highest number of pings out of silence on one connection."""
        return max((pings.count for pings in self._connections), default=0)

    def close(self) -> None:
        """Stop accepting connections; open ones end with the clients."""
        # close() alone would not wake the thread.
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._port))
                pings = Pings()
                self._connections.append(pings)
                for ends in ((client, server, pings), (server, client, None)):
                    threading.Thread(target=_copy, args=ends, daemon=True).start()


def _copy(source: socket.socket, target: socket.socket, pings: Pings | None) -> None:
    with closing(target), suppress(OSError):
        while data := source.recv(1 << 16):
            if pings:
                pings.feed(data, time.monotonic())
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
