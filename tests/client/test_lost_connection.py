"""Connections that end in the middle of a completion: the message says so."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from typing import TYPE_CHECKING

import pytest

from runner_client import AsyncRunnerClient, RunnerClient, RunnerUnavailableError
from runner_client.cli.shared.session import show_text
from runner_client.testing import fake_runner
from support.command_line import invoke

if TYPE_CHECKING:
    from collections.abc import Iterator

LOST = r"the connection to the runner at 127\.0\.0\.1:\d+ was lost.*\. The text is incomplete"


class Relay:
    """TCP relay to a server, which can cut its connections like a death of the server."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._server = (host, int(port))
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._server)
                self._sockets += [near, far]
                for pair in ((near, far), (far, near)):
                    thread = threading.Thread(target=self._copy, args=pair)
                    self._threads.append(thread)
                    thread.start()

    def _copy(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(2**16):
                target.sendall(data)

    def cut(self) -> None:
        """End all connections with a reset, and accept no others."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def close(self) -> None:
        """Cut all connections and wait for the threads."""
        self.cut()
        for thread in self._threads:
            thread.join(timeout=10)


@contextlib.contextmanager
def relayed() -> Iterator[Relay]:
    """Relay to a fake runner that generates more text than buffers hold."""
    with fake_runner(pieces=["x" * 1000] * 10_000) as runner:
        relay = Relay(runner.address)
        try:
            yield relay
        finally:
            relay.close()


def test_a_connection_lost_during_a_completion_is_not_called_unreachable() -> None:
    with relayed() as relay, RunnerClient(relay.address) as client, client.completion("Hi") as text:
        while not next(text).content:
            pass
        relay.cut()
        with pytest.raises(RunnerUnavailableError, match=LOST):
            list(text)


async def test_the_asyncio_client_says_the_same() -> None:
    with relayed() as relay:
        async with AsyncRunnerClient(relay.address) as client, client.completion("Hi") as text:
            while not (await anext(text)).content:
                pass
            relay.cut()
            with pytest.raises(RunnerUnavailableError, match=LOST):
                [chunk async for chunk in text]


def test_the_command_line_says_that_the_text_is_incomplete(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with relayed() as relay:

        def show_and_cut(content: str) -> None:
            show_text(content)
            if content:
                relay.cut()

        monkeypatch.setattr("runner_client.cli.run.show_text", show_and_cut)
        result = invoke("run", "--address", relay.address, "Hi")
    assert result.exit_code == 1
    assert result.stdout.startswith("x")
    assert "was lost" in result.stderr
    assert "The text is incomplete" in result.stderr


def test_a_runner_that_was_never_reached_is_called_unreachable() -> None:
    with relayed() as relay:
        relay.cut()
        with (
            RunnerClient(relay.address) as client,
            pytest.raises(RunnerUnavailableError, match="cannot reach the runner"),
        ):
            client.complete("Hi")
