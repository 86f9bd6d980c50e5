"""What is sent, how it is read, and how it ended."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum

from mlxrunner.v1 import runner_pb2 as pb

MAX_PROBLEMS = 50
"""How many problems are kept in words; all are counted."""


class SoakError(Exception):
    """The run cannot go on; the message says why."""


class Ending(StrEnum):
    """How a stream ended."""

    DONE = "done"
    """With its last message."""
    CANCELLED = "cancelled"
    """By its client, as planned."""
    EXPIRED = "deadline"
    """Its deadline passed."""
    REFUSED = "queue full"
    """The queue was full, and the answer said when to come again."""
    REJECTED = "rejected"
    """It was wrong on purpose, and the answer named the right reason."""
    FAILED = "failed"
    """Anything else: the run is not good."""
    STUCK = "stuck"
    """Not within the bound: the run is not good."""


@dataclass(frozen=True, slots=True)
class Reader:
    """How a stream is read.

    Attributes:
        pause_seconds: Waited after each message.
        stop_after: Messages after which it stops; 0 never does.
        stop_seconds: For how long it stops.
    """

    pause_seconds: float = 0.0
    stop_after: int = 0
    stop_seconds: float = 0.0

    @property
    def is_quick(self) -> bool:
        """Whether it takes all that comes at once."""
        return not (self.pause_seconds or self.stop_after)


@dataclass(frozen=True, slots=True)
class Order:
    """One request, with all that its client will do.

    Attributes:
        request: What is sent.
        known: Which of the known set it is; None if it is none of them.
        wrong: The reason it has to be rejected with; empty if it is in order.
        cancel_seconds: When it is cancelled, after it was sent.
        cancel_messages: After how many messages it is cancelled.
        deadline_seconds: The deadline of the call.
        reader: How it is read.
        own_connection: Whether it dials, and hangs up afterwards.
    """

    request: pb.CompletionRequest
    known: int | None = None
    wrong: str = ""
    cancel_seconds: float | None = None
    cancel_messages: int | None = None
    deadline_seconds: float | None = None
    reader: Reader = field(default_factory=Reader)
    own_connection: bool = False

    @property
    def is_cancelled(self) -> bool:
        """Whether its client will cancel it, if it has not ended by then."""
        return self.cancel_seconds is not None or self.cancel_messages is not None


@dataclass(frozen=True, slots=True)
class Answer:
    """The text of a completion."""

    text: str
    token_ids: tuple[int, ...]


@dataclass
class Tally:
    """What all streams of a run came to.

    Attributes:
        sent: Requests sent, those that were wrong on purpose included.
        held_back: Requests not sent because too many were under way.
        endings: How they ended.
        tokens: Tokens received.
        compared: Finished completions of the known set.
        prefixes: Completions of the known set that were cut, compared as far as they came.
        differing: Of both, those that were not the text they give alone.
        queue_seconds: How long finished ones waited for a place, as the server says.
        first_seconds: From sending to the first token.
        retry_seconds: What refused ones were told to wait.
        problem_count: What must not be.
        problems: The first of them in words.
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

    def note_problem(self, words: str) -> None:
        """Counts what must not be."""
        self.problem_count += 1
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(words)

    @property
    def accepted(self) -> int:
        """Requests that the server took on."""
        turned_away = self.endings[Ending.REFUSED] + self.endings[Ending.REJECTED]
        return self.endings.total() - turned_away

    @property
    def overload(self) -> float:
        """Requests in order that were sent, for each that was taken on."""
        asked = self.endings.total() - self.endings[Ending.REJECTED]
        return asked / self.accepted if self.accepted else 0.0


@dataclass(frozen=True, slots=True)
class Sample:
    """What was seen at one moment.

    Attributes:
        seconds: Since the load began.
        tokens_per_second: Received since the sample before.
        status_seconds: How long Status took to answer.
        threads: Of the server's process.
        descriptors: Open ones of the server's process.
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
