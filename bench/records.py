"""What is asked of a contender, and what came back when."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

TEMPERATURE = 0.8
TOP_P = 0.95
TOP_K = 40
"""How a sampled request draws; a greedy one takes the likeliest token."""


class ContenderError(Exception):
    """A contender cannot be started, failed, or did not do what was asked."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """The same prompt twice: some contenders take text, others token ids."""

    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Request:
    """One stream.

    Attributes:
        prompt: What to complete.
        max_tokens: How many tokens to generate, exactly.
        sampled: Draw with ``TEMPERATURE``, ``TOP_P`` and ``TOP_K``; else greedy.
        seed: Of the draws, for contenders that can have one for each request.
        delay_seconds: When to send it, after the start of the run.
        background: End it a moment after all other streams of the run are done.
        want_ids: The token ids are compared, so a contender that streams text only
            may answer in one piece.
    """

    prompt: Prompt
    max_tokens: int
    sampled: bool = False
    seed: int = 0
    delay_seconds: float = 0.0
    background: bool = False
    want_ids: bool = False


@dataclass(slots=True)
class Record:
    """What one stream brought. Times are ``time.monotonic()``.

    Attributes:
        sent: When the request was sent.
        chunks: Each message that brought tokens: when, and how many. A contender that
            streams text does not say how many; each of its messages counts as one.
        prompt_tokens: As the contender counted them.
        completion_tokens: As the contender counted them.
        token_ids: The tokens, where it gives their ids.
    """

    sent: float = 0.0
    chunks: list[tuple[float, int]] = field(default_factory=list)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    token_ids: list[int] = field(default_factory=list)

    @property
    def first(self) -> float:
        """When the first token came."""
        if not self.chunks:
            raise ContenderError("a stream brought no token")
        return self.chunks[0][0]

    @property
    def last(self) -> float:
        """When the last token came."""
        return self.chunks[-1][0] if self.chunks else self.sent

    @property
    def ttft_seconds(self) -> float:
        """Time to first token."""
        return self.first - self.sent

    @property
    def decode_rate(self) -> float:
        """Tokens per second after the first one."""
        return (self.completion_tokens - 1) / (self.last - self.first)

    def check(self, request: Request) -> None:
        """Makes sure that the contender did the work it was asked to do.

        Raises:
            ContenderError: It counted another prompt, or generated another number of tokens.
        """
        wanted = (len(request.prompt.token_ids), request.max_tokens)
        if (self.prompt_tokens, self.completion_tokens) != wanted:
            raise ContenderError(
                f"asked for {wanted[1]} tokens after {wanted[0]}, got {self.completion_tokens} "
                f"after {self.prompt_tokens}"
            )


def longest_gap(record: Record, begin: float, end: float) -> float:
    """The longest wait for a message between two times, in seconds."""
    times = [begin, *(time for time, _ in record.chunks if begin < time < end), end]
    return max(after - before for before, after in itertools.pairwise(times))


def rate(records: list[Record]) -> float:
    """Tokens per second of all streams together, from the first request to the last token."""
    tokens = sum(record.completion_tokens for record in records)
    begin = min(record.sent for record in records)
    return tokens / (max(record.last for record in records) - begin)
