"""A connection between ranks."""

from __future__ import annotations

import socket

import pytest

from runner_server.distributed.link import Link
from runner_server.distributed.messages import AskStop, Close


def _connected() -> tuple[socket.socket, socket.socket]:
    """Connect two sockets by TCP, which resets a connection closed with unread bytes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        return one, listener.accept()[0]


def test_the_last_message_arrives_although_the_sender_has_unread_messages() -> None:
    """Closing at once would reset the connection, and drop the message."""
    one, other = (Link(end) for end in _connected())
    other.send(AskStop())
    one.send(Close())
    one.finish()
    assert other.receive() == Close()
    with pytest.raises(ConnectionResetError, match="closed"):
        other.receive()
    assert one.receive() == AskStop()
    other.close()
    one.close()
