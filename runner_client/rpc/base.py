"""What the sync and the asyncio client share: address, timeouts, and what an error means."""

from __future__ import annotations

import asyncio

import grpc

from runner_client.errors import (
    IncompleteStreamError,
    NotSupportedError,
    RunnerError,
    RunnerUnavailableError,
)
from runner_client.rpc.access import Access
from runner_client.rpc.translate import translate
from runner_client.types import Timeouts, TlsFiles

POLL_SECONDS = 0.2
"""How often a load's progress is looked at."""

STATUS_SECONDS = 2.0
"""The deadline of such a look; a server that does not answer it does not move."""

LOAD_SECONDS = 24 * 3600.0
"""The deadline of a load, in case nobody watches it. While it moves it has no other."""

END_SECONDS = 1.0
"""How long a stream's end is waited for after its last message."""


_MAX_PORT = 65535


class ClientBase:
    """The parts of a client that do no input or output."""

    def __init__(
        self,
        address: str,
        timeouts: Timeouts | None,
        token: str | None,
        tls: TlsFiles | None,
    ) -> None:
        if not address:
            raise ValueError("the address of the runner is empty; give HOST:PORT or unix:/path")
        port = address.rpartition(":")[2]
        # gRPC would call the port of the number's remainder.
        if port.isdecimal() and int(port) > _MAX_PORT:
            raise ValueError(f"{address}: a port is at most {_MAX_PORT}")
        self._address = address
        self._timeouts = timeouts or Timeouts()
        self._access = Access.of(token, tls)
        self._is_closed = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._address!r})"

    @property
    def address(self) -> str:
        """Where the runner is called, as gRPC takes it."""
        return self._address

    @property
    def timeouts(self) -> Timeouts:
        """How long this client waits for what."""
        return self._timeouts

    def _translated(
        self, error: BaseException, timeout_seconds: float | None = None
    ) -> RunnerError:
        """The exception that stands for what gRPC raised.

        Anything but ``grpc.RpcError`` comes from a call that this side cut off, or
        from a channel that is closed; a bug of this library is raised again.
        """
        code = error.code() if isinstance(error, grpc.RpcError) else grpc.StatusCode.CANCELLED
        if self._is_closed and code is grpc.StatusCode.CANCELLED:
            return RunnerUnavailableError(f"the client of the runner at {self._address} is closed")
        if isinstance(error, grpc.RpcError):
            return translate(error, address=self._address, timeout_seconds=timeout_seconds)
        if isinstance(error, grpc.FutureCancelledError | asyncio.CancelledError):
            return RunnerUnavailableError(f"a call to the runner at {self._address} was cut off")
        raise error


def incomplete_stream() -> IncompleteStreamError:
    """The error of a stream that ended without its last message."""
    return IncompleteStreamError(
        "the completion's stream ended without its last message: the text is cut; retry it"
    )


def cancelled_stream() -> IncompleteStreamError:
    """The error of reading on in a stream that this side cancelled."""
    return IncompleteStreamError("this completion was cancelled by its reader: the text is cut")


def embedding_error() -> NotSupportedError:
    """What the interface that this client follows answers to an embedding."""
    return NotSupportedError("embeddings are not supported: the runner completes text only")
