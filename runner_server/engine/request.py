"""Identity, status and times of the requests in the engine."""

from __future__ import annotations

import enum
import itertools
import time
from typing import Generic, TypeVar

from runner_server.engine.output.base import Channel
from runner_server.errors import RunnerFault

_ids = itertools.count(1)

_Channel_co = TypeVar("_Channel_co", bound=Channel, covariant=True)


class RequestStatus(enum.Enum):
    """Stage of a request.

    Attributes:
        WAITING: Queued; holds no memory.
        PREFILLING: In the batch, without a token yet; or its texts are being embedded.
        DECODING: In the batch, with at least one token.
        PREEMPTED: Out of the batch because its reader is slow; keeps its KV cache.
        FINISHED: Ended, failed or cancelled.
    """

    WAITING = "waiting"
    PREFILLING = "prefilling"
    DECODING = "decoding"
    PREEMPTED = "preempted"
    FINISHED = "finished"


class EngineRequest(Generic[_Channel_co]):
    """Base of the requests, which end once and pass their outcome to a channel.

    Belongs to the engine's thread, except that any thread may read :attr:`status` and the
    attributes that never change. A transition that the status does not allow raises
    :class:`RuntimeError`.

    Args:
        request_id: The caller's name for the request; may be empty.
        priority: Higher first among waiting requests.
        max_length: Largest possible number of tokens in a sequence of the request.
        stream: The channel to the reader.

    Attributes:
        id: Id of the request and of its row, unique in this process; not the caller's id.
        request_id: The caller's name for the request.
        priority: Higher first among waiting requests.
        max_length: Largest possible number of tokens in a sequence of the request.
        status: The stage that the request has reached.
        stream: The channel to the reader.
        submitted_at: Time of arrival, in seconds of the monotonic clock.
    """

    def __init__(
        self, request_id: str, priority: int, max_length: int, stream: _Channel_co
    ) -> None:
        self.id = next(_ids)
        self.request_id = request_id
        self.priority = priority
        self.max_length = max_length
        self.status = RequestStatus.WAITING
        self.stream = stream
        self.submitted_at = time.monotonic()
        self._admitted_at: float | None = None
        self._finished_at: float | None = None

    @property
    def kv_token_count(self) -> int:
        """Number of tokens in the KV cache. Thread-safe."""
        raise NotImplementedError

    def admit(self) -> None:
        """Transition from WAITING to PREFILLING: the request takes memory."""
        self._transition(RequestStatus.PREFILLING, RequestStatus.WAITING)
        self._admitted_at = time.monotonic()

    def cancel(self) -> None:
        """Transition to FINISHED because the reader is gone."""
        self._finish()

    def fail(self, fault: RunnerFault) -> None:
        """Transition to FINISHED with an error, which follows the output already put."""
        self._finish()
        self.stream.fail(fault)

    def _finish(self) -> None:
        if self.status is RequestStatus.FINISHED:
            raise self._illegal(RequestStatus.FINISHED)
        self._finished_at = time.monotonic()
        self.status = RequestStatus.FINISHED

    def _transition(self, to: RequestStatus, expected: RequestStatus) -> None:
        if self.status is not expected:
            raise self._illegal(to)
        self.status = to

    def _illegal(self, to: RequestStatus) -> RuntimeError:
        return RuntimeError(f"request {self.id} is {self.status.value} and cannot be {to.value}")
