"""Log probabilities of tokens, as plain data."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class TokenLogprob:
    """Log probability of a token and of the likeliest alternatives, as pairs (id, logprob).

    Attributes:
        text: Contribution of the token to the text, before stop strings are cut off; empty in
            the events of a batch.
        candidates: Log probabilities of ``Sampling.logprob_token_ids``, as pairs (id, logprob).
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    text: str = ""
    candidates: tuple[tuple[int, float], ...] = ()

    @property
    def others(self) -> tuple[tuple[int, float], ...]:
        """The likely tokens, and then the candidates."""
        return self.top + self.candidates


@dataclass(frozen=True)
class PromptLogprobs:
    """Log probabilities of consecutive tokens of a prompt, as arrays.

    A prompt of 100,000 tokens with 20 likely tokens each takes 17 MB; as objects, ten times that.

    Attributes:
        token_ids: The tokens.
        chosen: Log probability of each token.
        top_ids: The most likely tokens at each position, most likely first, as one sequence.
        top_values: Log probabilities of ``top_ids``.
    """

    token_ids: array[int]
    chosen: array[float]
    top_ids: array[int]
    top_values: array[float]

    @property
    def width(self) -> int:
        """Number of likely tokens at each position."""
        return len(self.top_ids) // len(self.token_ids)

    def parts(self, most: int) -> Iterator[PromptLogprobs]:
        """Yield parts of at most ``most`` tokens."""
        width = self.width
        for start in range(0, len(self.token_ids), most):
            own = slice(start, start + most)
            top = slice(start * width, (start + most) * width)
            yield PromptLogprobs(
                self.token_ids[own], self.chosen[own], self.top_ids[top], self.top_values[top]
            )

    def entries(self) -> Iterator[TokenLogprob]:
        """Yield the log probabilities of each token, without texts."""
        width = self.width
        pairs = tuple(zip(self.top_ids, self.top_values, strict=True))
        for i, (token_id, logprob) in enumerate(zip(self.token_ids, self.chosen, strict=True)):
            yield TokenLogprob(token_id, logprob, pairs[i * width : (i + 1) * width])
