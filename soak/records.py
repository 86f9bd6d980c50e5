"""Data of a soak: planned requests, outcomes and samples."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum

from mlxrunner.v1 import runner_pb2 as pb

MAX_PROBLEMS = 50
"""Number of problem descriptions kept; the count includes every problem."""


class SoakError(Exception):
    """The soak cannot continue."""


class Ending(StrEnum):
    """Ending of a stream."""

    DONE = "done"
    """The last message arrived."""
    CANCELLED = "cancelled"
    """The client cancelled as planned."""
    EXPIRED = "deadline"
    """The deadline passed as planned."""
    REFUSED = "queue full"
    """The queue was full; the status includes a retry delay."""
    REJECTED = "rejected"
    """An invalid request was rejected for the expected reason."""
    DECLINED = "declined"
    """A pool had no room without an eviction that the caller did not want, or could not make."""
    WRONGLY_REFUSED = "wrongly refused"
    """A pool refused a model that it could have loaded; fails the soak."""
    FAILED = "failed"
    """Any other outcome; fails the soak."""
    STUCK = "stuck"
    """No end within the time limit; fails the soak."""


@dataclass(frozen=True, slots=True)
class Reader:
    """Reading behaviour of a client.

    Attributes:
        pause_seconds: Pause after each message.
        stop_after: Number of messages after which to stop reading once; 0 never stops.
        stop_seconds: Duration of the stop.
    """

    pause_seconds: float = 0.0
    stop_after: int = 0
    stop_seconds: float = 0.0

    @property
    def is_quick(self) -> bool:
        """True if the reader takes every message immediately."""
        return not (self.pause_seconds or self.stop_after)


@dataclass(frozen=True, slots=True)
class Order:
    """A request with the planned behaviour of the client.

    Attributes:
        request: Request message.
        known: Index in the known set; None for other requests.
        expected_reason: Error reason expected for an invalid request; empty for a valid one.
        cancel_seconds: Time from sending to cancelling.
        cancel_messages: Number of messages after which to cancel.
        deadline_seconds: Deadline of the call.
        reader: Reading behaviour.
        own_connection: Use a separate connection that is closed afterwards.
    """

    request: pb.CompletionRequest
    known: int | None = None
    expected_reason: str = ""
    cancel_seconds: float | None = None
    cancel_messages: int | None = None
    deadline_seconds: float | None = None
    reader: Reader = field(default_factory=Reader)
    own_connection: bool = False

    @property
    def is_cancelled(self) -> bool:
        """True if the client cancels the request unless the stream ends first."""
        return self.cancel_seconds is not None or self.cancel_messages is not None


@dataclass(frozen=True, slots=True)
class Answer:
    """Text and token ids of a completion."""

    text: str
    token_ids: tuple[int, ...]


@dataclass
class Tally:
    """Outcomes of every stream of a run.

    Attributes:
        sent: Requests sent, including the invalid ones.
        held_back: Requests not sent because too many were in flight.
        endings: Number of streams by ending.
        tokens: Tokens received.
        compared: Finished completions of the known set.
        prefixes: Partial completions of the known set, compared up to where each ended.
        differing: Completions, finished or partial, that differ from the reference.
        queue_seconds: Queueing times of finished completions, as reported by the server.
        first_seconds: Times from sending to the first token.
        retry_seconds: Retry delays of refused requests.
        problem_count: Number of problems.
        problems: Descriptions of the first problems.
    """

    sent: int = 0
    held_back: int = 0
    endings: Counter[Ending] = field(default_factory=Counter)
    tokens: int = 0
    compared: int = 0
    prefixes: int = 0
    differing: int = 0
    queue_seconds: list[float] = field(default_factory=list)
    first_seconds: list[float] = field(default_factory=list)
    retry_seconds: list[float] = field(default_factory=list)
    problem_count: int = 0
    problems: list[str] = field(default_factory=list)

    def note_problem(self, description: str) -> None:
        """Count a problem and keep the description of the first ones."""
        self.problem_count += 1
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(description)

    @property
    def accepted(self) -> int:
        """Number of requests accepted by the server."""
        turned_away = self.endings[Ending.REFUSED] + self.endings[Ending.REJECTED]
        return self.endings.total() - turned_away

    @property
    def overload(self) -> float:
        """Ratio of valid requests sent to requests accepted."""
        asked = self.endings.total() - self.endings[Ending.REJECTED]
        return asked / self.accepted if self.accepted else 0.0


@dataclass(frozen=True, slots=True)
class Sample:
    """State of the server at one moment.

    Attributes:
        seconds: Time since the start of the load.
        tokens_per_second: Tokens received since the previous sample.
        status_seconds: Latency of ``Status``.
        threads: Threads of the server process.
        descriptors: Open file descriptors of the server process.
    """

    seconds: float
    tokens_per_second: float
    running: int
    queued: int
    rss_bytes: int
    active_bytes: int
    cache_bytes: int
    prefix_bytes: int
    status_seconds: float
    threads: int
    descriptors: int
