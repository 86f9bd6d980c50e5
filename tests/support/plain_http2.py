"""gRPC by hand over HTTP/2, sharing no code with grpcio."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
)

_TIMEOUT_SECONDS = 20.0
_PREFIX_BYTES = 5
"""Prefix of each message: a compression flag, and the length in four bytes."""


@dataclass
class Answer:
    """Response to a call.

    Attributes:
        headers: Headers and trailers, merged.
        data: The messages, each with its prefix.
        is_over: Whether the stream has ended.
        is_trailers_only: Whether the status came without headers before it.
    """

    headers: dict[str, str] = field(default_factory=dict)
    data: bytes = b""
    is_over: bool = False
    is_trailers_only: bool = False

    @property
    def message(self) -> bytes:
        """Encoded message of a unary response; empty if none came."""
        return self.data[_PREFIX_BYTES:]

    @property
    def status(self) -> int:
        """Number of the gRPC status; -1 if none came."""
        return int(self.headers.get("grpc-status", -1))

    def take(self, event: Event) -> None:
        """Record an event of the connection."""
        match event:
            case ResponseReceived() | TrailersReceived():
                is_first = not self.headers
                self.headers |= {str(key): str(value) for key, value in event.headers or ()}
                self.is_trailers_only |= is_first and "grpc-status" in self.headers
            case DataReceived():
                self.data += event.data or b""
            case StreamEnded() | StreamReset() | ConnectionTerminated():
                self.is_over = True


def call(
    port: int,
    method: str,
    message: bytes = b"",
    *,
    headers: Sequence[tuple[str, str | bytes]] = (),
    tls: ssl.SSLContext | None = None,
    is_last: bool = True,
) -> Answer:
    """Make a blocking call over a new connection.

    Args:
        port: Port on the loopback address.
        method: ``package.Service/Method``.
        message: The encoded request.
        headers: Additional headers, with lower-case names.
        tls: TLS context; None sends plain text.
        is_last: Whether to end the stream of requests.

    Raises:
        OSError: The connection or the TLS handshake failed.
    """
    with socket.create_connection(("127.0.0.1", port), _TIMEOUT_SECONDS) as plain:
        if tls is None:
            return _exchange(plain, method, message, headers, is_last=is_last)
        tls.set_alpn_protocols(["h2"])
        with tls.wrap_socket(plain, server_hostname="localhost") as secret:
            return _exchange(secret, method, message, headers, is_last=is_last)


def _exchange(
    connected: socket.socket,
    method: str,
    message: bytes,
    headers: Sequence[tuple[str, str | bytes]],
    *,
    is_last: bool,
) -> Answer:
    connection = H2Connection(H2Configuration(header_encoding="utf-8"))
    connection.initiate_connection()
    stream = connection.get_next_available_stream_id()
    about = [(":method", "POST"), (":scheme", "http"), (":path", f"/{method}")]
    about += [(":authority", "localhost"), ("te", "trailers"), ("content-type", "application/grpc")]
    # Bytes bypass the check for characters that a header may not contain.
    given = [
        (name.encode(), value) if isinstance(value, bytes) else (name, value)
        for name, value in headers
    ]
    connection.send_headers(stream, [*about, *given])
    framed = b"\0" + len(message).to_bytes(4, "big") + message
    connection.send_data(stream, framed, end_stream=is_last)
    answer = Answer()
    while not answer.is_over:
        connected.sendall(connection.data_to_send())
        received = connected.recv(65536)
        if not received:
            raise ConnectionResetError("the server closed the connection")
        for event in connection.receive_data(received):
            answer.take(event)
    return answer
