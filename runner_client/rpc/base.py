"""Code shared by the sync and the asyncio client: address, timeouts and error translation."""

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
from runner_client.rpc.address import parse_address
from runner_client.rpc.translate import translate
from runner_client.types import Timeouts, TlsFiles

POLL_SECONDS = 0.2
"""Interval between status requests during a load."""

STATUS_SECONDS = 2.0
"""Deadline of such a status request; a server that misses it makes no progress."""

LOAD_SECONDS = 24 * 3600.0
"""Deadline of a load in case no client watches its progress. A watched load is only limited by
``Timeouts.load_seconds``."""

END_SECONDS = 1.0
"""How long to wait for the end of a stream after its last message."""


class ClientBase:
    """Base of the clients: everything except I/O."""

    def __init__(
        self,
        address: str,
        timeouts: Timeouts | None,
        token: str | None,
        tls: TlsFiles | None,
    ) -> None:
        self._address = parse_address(address)
        self._timeouts = timeouts or Timeouts()
        self._access = Access.of(token, tls)
        self._is_closed = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._address!r})"

    @property
    def address(self) -> str:
        """The runner's address, as passed to gRPC."""
        return self._address

    @property
    def timeouts(self) -> Timeouts:
        """The timeouts of this client."""
        return self._timeouts

    def _translated(
        self, error: BaseException, timeout_seconds: float | None = None
    ) -> RunnerError:
        """Return the exception of this library for an error raised by gRPC.

        Errors other than ``grpc.RpcError`` come from a call that this side ended, or from a closed
        channel. Anything else is a bug in this library and raised unchanged.
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
    """Return the error for a stream ended without a last message."""
    return IncompleteStreamError(
        "the completion's stream ended without its last message: the text is incomplete; retry it"
    )


def cancelled_stream() -> IncompleteStreamError:
    """Return the error for reading a cancelled stream."""
    return IncompleteStreamError(
        "this completion was cancelled by its reader: the text is incomplete"
    )


def embedding_error() -> NotSupportedError:
    """Return the error for an embedding, a call offered for API compatibility only."""
    return NotSupportedError("embeddings are not supported: the runner completes text only")
