"""Order of the texts of a request, and choice of the texts for one call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from runner_server.engine.work import TextChunk


class TextJob:
    """The texts of one request, the longest first, which puts similar lengths side by side.

    For example, with 128 tokens in a call at most, and texts of 10, 300 and 12 tokens: the text of
    300 tokens runs alone in three parts, then those of 12 and 10 tokens in one call.

    Args:
        row: Id of the request.
        lengths: Number of tokens of each text, at least 1.

    Attributes:
        row: Id of the request.
        remaining: Tokens left to evaluate, of all texts.
    """

    def __init__(self, row: int, lengths: Sequence[int]) -> None:
        self.row = row
        self.remaining = sum(lengths)
        self._lengths = lengths
        # The texts without a vector, and the tokens of the first one in its KV cache.
        self._left = sorted(range(len(lengths)), key=lambda text: -lengths[text])
        self._position = 0

    def next_chunk(self, count: int, max_chunk: int) -> TextChunk:
        """Return the next part of the first text.

        Args:
            count: Tokens that fit; half as many again may be taken if they end the text.
            max_chunk: Most tokens in any case.
        """
        text = self._left[0]
        left = self._lengths[text] - self._position
        if left > min(count * 3 // 2, max_chunk):
            return TextChunk(self.row, text, count, is_last=False)
        return TextChunk(self.row, text, left, is_last=True)

    def is_whole(self, chunk: TextChunk) -> bool:
        """Return whether a chunk is a text from beginning to end."""
        return chunk.count == self._lengths[chunk.text]

    def whole_texts(self, least: int, most: int) -> Iterator[TextChunk]:
        """Yield the texts of ``least`` to ``most`` tokens; none while a text is in part."""
        for text in () if self._position else self._left:
            count = self._lengths[text]
            if least <= count <= most:
                yield TextChunk(self.row, text, count, is_last=True)

    def record(self, chunk: TextChunk) -> tuple[int, int] | None:
        """Record the evaluation of a chunk.

        Returns:
            The tokens of the text in its KV cache, and its length; None if the text is complete.
        """
        self.remaining -= chunk.count
        if chunk.is_last:
            self._left.remove(chunk.text)
            self._position = 0
            return None
        self._position += chunk.count
        return self._position, self._lengths[chunk.text]


def texts_together(
    job: TextJob, chunk: TextChunk, others: Iterable[TextJob], most: int
) -> tuple[TextChunk, ...]:
    """Choose texts to evaluate in the same call as a whole text, which reads the weights once.

    None is longer, and none is shorter than half of it, because padding would then cost more than
    a call of its own.

    Args:
        job: The job of the chunk.
        chunk: The text, of which no part was evaluated before.
        others: The other jobs, in order of arrival.
        most: Most texts in the call, this one included.
    """
    least = (chunk.count + 1) // 2
    jobs = (job, *others)
    candidates = (each for one in jobs for each in one.whole_texts(least, chunk.count))
    added = (each for each in candidates if each != chunk)
    return (chunk, *islice(added, max(0, most - 1)))
