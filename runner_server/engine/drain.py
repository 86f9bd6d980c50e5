"""A drain: new requests are refused until the present ones have ended."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress

from runner_server.engine.embedding.request import AnyRequest
from runner_server.errors import Aborted, RunnerFault


class Drain:
    """Wait for the end of some requests. The registry guards the methods with its lock.

    Args:
        requests: The unfinished requests.

    Attributes:
        requests: The requests unfinished at the beginning.
        future: Resolves once they have ended, or to a fault.
    """

    def __init__(self, requests: Iterable[AnyRequest]) -> None:
        self.requests = tuple(requests)
        self.future: Future[None] = Future()
        self._left = {request.id for request in self.requests}
        self._resolve_if_ended()

    def note_end(self, request_id: int) -> None:
        """Record that a request has ended. No-op for requests accepted later."""
        self._left.discard(request_id)
        self._resolve_if_ended()

    def fail(self, fault: RunnerFault) -> None:
        """Resolve with a fault unless resolved."""
        with suppress(InvalidStateError):
            self.future.set_exception(fault)

    @property
    def aborted_count(self) -> int:
        """Number of its requests that ended with :class:`Aborted`."""
        return sum(isinstance(request.stream.fault, Aborted) for request in self.requests)

    def _resolve_if_ended(self) -> None:
        if not self._left:
            with suppress(InvalidStateError):
                self.future.set_result(None)
