"""Code shared by both connections: address, timeouts, error translation and the peer."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol

import grpc

from runner_client.checks import check_kind, check_text
from runner_client.errors import (
    IncompleteStreamError,
    RunnerError,
    RunnerUnavailableError,
)
from runner_client.rpc.transport.access import Access
from runner_client.rpc.transport.address import parse_address
from runner_client.rpc.transport.translate import translate
from runner_client.types import Timeouts, TlsFiles

if TYPE_CHECKING:
    from runner_client.types import Status

POLL_SECONDS = 0.2
"""Interval between status requests during a load."""

STATUS_SECONDS = 2.0
"""Deadline of each status request that watches a load or an engine. A load makes no progress while
its server misses the deadline."""

LOAD_SECONDS = 24 * 3600.0
"""Deadline of every load, in case no client watches its progress. A watched load without progress
ends earlier, after ``Timeouts.load_seconds``."""

DRAIN_SECONDS = 30 * 24 * 3600.0
"""Deadline of every drain, which ends by the ``timeout_seconds`` of its caller."""

END_SECONDS = 1.0
"""The longest wait for the end of a stream after its last message."""


class Peer(Protocol):
    """Process that serves an address, for a client whose owner also owns the process."""

    def explain(self, error: RunnerError) -> RunnerError:
        """Return the error to raise in place of ``error``. May block for half a second."""

    def note_memory(self, process_bytes: int) -> None:
        """Record the resident set reported by a status, in bytes."""


class ConnectionBase:
    """Base class of the sync and asyncio connections: everything except I/O."""

    def __init__(
        self,
        address: str,
        timeouts: Timeouts | None,
        token: str | None,
        tls: TlsFiles | None,
        peer: Peer | None,
    ) -> None:
        check_text("address", address)
        check_text("token", "" if token is None else token)
        check_kind("tls", tls, TlsFiles)
        check_kind("timeouts", timeouts, Timeouts)
        self.address = parse_address(address)
        self.timeouts = timeouts or Timeouts()
        self.access = Access.of(token, tls)
        self.peer = peer
        self.is_closed = False

    def note_status(self, status: Status) -> None:
        """Pass the resident set in a status to the peer."""
        if self.peer is not None:
            self.peer.note_memory(status.memory_usage.process_bytes)

    def translated(self, error: BaseException, timeout_seconds: float | None = None) -> RunnerError:
        """Return the exception of this library for an error raised by gRPC.

        Cancellations come from a call ended on this side, and errors of other types from a closed
        channel. On an open channel the latter are a bug in this library and reraised unchanged.
        """
        code = error.code() if isinstance(error, grpc.RpcError) else grpc.StatusCode.CANCELLED
        if self.is_closed and code is grpc.StatusCode.CANCELLED:
            return RunnerUnavailableError(f"the client of the runner at {self.address} is closed")
        if isinstance(error, grpc.RpcError):
            return translate(
                error,
                address=self.address,
                timeout_seconds=timeout_seconds,
                is_encrypted=self.access.credentials is not None,
            )
        if isinstance(error, grpc.FutureCancelledError | asyncio.CancelledError):
            return RunnerUnavailableError(f"a call to the runner at {self.address} was cut off")
        raise error


def incomplete_stream() -> IncompleteStreamError:
    """Return the error for a stream ended without the last message."""
    return IncompleteStreamError(
        "the completion's stream ended without its last message: the text is incomplete; retry it"
    )


def cut_off(failure: RunnerError) -> RunnerError:
    """Mark the text as incomplete in the error of a lost connection, and return the error."""
    if type(failure) is RunnerUnavailableError:
        failure.args = (f"{failure}. The text is incomplete; retry it",)
    return failure


def cancelled_stream() -> IncompleteStreamError:
    """Return the error for reading a cancelled stream."""
    return IncompleteStreamError(
        "this completion was cancelled by its reader: the text is incomplete"
    )
