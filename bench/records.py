"""Requests sent to a contender and timed records of the responses."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

TEMPERATURE = 0.8
TOP_P = 0.95
TOP_K = 40
"""Sampling settings of sampled requests; greedy requests take the most likely token."""


class ContenderError(Exception):
    """A contender cannot start, failed, or did not do the requested work."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """Prompt as text and as token ids, since contenders accept one or the other."""

    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Request:
    """One streaming request.

    Attributes:
        prompt: Prompt to complete.
        max_tokens: Exact number of tokens to generate.
        sampled: Sample with ``TEMPERATURE``, ``TOP_P`` and ``TOP_K`` instead of greedily.
        seed: Sampling seed, for contenders that support one per request.
        delay_seconds: Time from the start of the run to sending the request.
        background: Cancel the stream shortly after all other streams of the run are done.
        want_ids: Token ids will be compared, so a contender that streams text only may respond
            without streaming.
        json_schema: JSON schema of the text, which must not end within ``max_tokens``; empty for a
            free text. Only ours supports it.
    """

    prompt: Prompt
    max_tokens: int
    sampled: bool = False
    seed: int = 0
    delay_seconds: float = 0.0
    background: bool = False
    want_ids: bool = False
    json_schema: str = ""


@dataclass(slots=True)
class Record:
    """Timed result of one stream. Times are ``time.monotonic()``.

    Attributes:
        sent: When the request was sent.
        chunks: Arrival time and token count of each message with tokens. A contender that
            streams text does not report counts; each of its messages counts as one token.
        prompt_tokens: Prompt tokens as counted by the contender.
        completion_tokens: Generated tokens as counted by the contender.
        token_ids: Generated token ids, if the contender returns them.
    """

    sent: float = 0.0
    chunks: list[tuple[float, int]] = field(default_factory=list)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    token_ids: list[int] = field(default_factory=list)

    @property
    def first(self) -> float:
        """Arrival time of the first token."""
        if not self.chunks:
            raise ContenderError("a stream returned no token")
        return self.chunks[0][0]

    @property
    def last(self) -> float:
        """Arrival time of the last token."""
        return self.chunks[-1][0] if self.chunks else self.sent

    @property
    def ttft_seconds(self) -> float:
        """Time to first token."""
        return self.first - self.sent

    @property
    def decode_rate(self) -> float:
        """Tokens per second after the first token."""
        return (self.completion_tokens - 1) / (self.last - self.first)

    def check(self, request: Request) -> None:
        """Check that the contender did the requested work.

        Raises:
            ContenderError: The number of prompt or generated tokens is not the requested one.
        """
        wanted = (len(request.prompt.token_ids), request.max_tokens)
        if (self.prompt_tokens, self.completion_tokens) != wanted:
            raise ContenderError(
                f"expected {wanted[1]} tokens for a prompt of {wanted[0]}, got "
                f"{self.completion_tokens} for a prompt of {self.prompt_tokens}"
            )


def longest_gap(record: Record, begin: float, end: float) -> float:
    """Return the longest wait for a message between two times, in seconds."""
    times = [begin, *(time for time, _ in record.chunks if begin < time < end), end]
    return max(after - before for before, after in itertools.pairwise(times))


def rate(records: list[Record]) -> float:
    """Return the combined tokens per second, from the first request to the last token."""
    tokens = sum(record.completion_tokens for record in records)
    begin = min(record.sent for record in records)
    return tokens / (max(record.last for record in records) - begin)
