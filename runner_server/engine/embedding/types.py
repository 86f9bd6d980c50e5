"""Plain data of embeddings: frozen dataclasses, which any thread may keep."""

from __future__ import annotations

from array import array
from dataclasses import dataclass


@dataclass(frozen=True)
class EmbeddingInfo:
    """Support of a loaded model for embeddings.

    Attributes:
        dimension: Numbers in a vector; 0 if the model does not embed.
        max_tokens: Longest text, in tokens, by the model's files and the context in force.
        is_file_limit: Whether the model's files set that limit.
        problem: Why the model does not embed; empty if it does.
    """

    dimension: int = 0
    max_tokens: int = 0
    is_file_limit: bool = False
    problem: str = "the model is not loaded for embeddings"


@dataclass(frozen=True)
class EmbedSpec:
    """A validated request.

    Attributes:
        texts: The tokens of each text: at least one text with at least one token.
        request_id: The caller's name for the request, not necessarily unique; may be empty.
        priority: Higher first among waiting requests.
    """

    texts: tuple[tuple[int, ...], ...]
    request_id: str = ""
    priority: int = 0


@dataclass(frozen=True)
class Embedded:
    """Event: a text was embedded.

    Attributes:
        row: Id of the request.
        text: Index of the text in the request.
        vector: 32-bit floats.
    """

    row: int
    text: int
    vector: array[float]


@dataclass(frozen=True)
class Vectors:
    """Outcome of a request; durations in seconds.

    Attributes:
        vectors: One for each text.
        queue_seconds: Time in the queue.
        seconds: Time from admission to the end.
    """

    vectors: tuple[array[float], ...]
    queue_seconds: float
    seconds: float
