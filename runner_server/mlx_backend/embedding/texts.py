"""Evaluation of texts, and pooling of their hidden states into vectors."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx

from runner_server.engine.embedding.types import Embedded
from runner_server.engine.types import NotFinite
from runner_server.engine.work import TextChunk
from runner_server.mlx_backend.cache.row_caches import Caches, evaluate
from runner_server.mlx_backend.embedding.hidden import Body

_LEAST_LENGTH = 1e-12
"""Length by which shorter vectors are divided, as in ``torch.nn.functional.normalize``."""


@dataclass(frozen=True)
class TextModel:
    """Base model, caches and pooling of a model.

    Attributes:
        body: Gives the hidden states.
        new_caches: Creates empty caches of the model.
        pooling: Modes of pooling; see ``EmbeddingFiles``.
        normalizes: Whether vectors are divided by their length.
    """

    body: Body
    new_caches: Callable[[], Caches]
    pooling: tuple[str, ...]
    normalizes: bool


@dataclass(eq=False)
class _Part:
    """A text of which the first tokens were evaluated.

    Attributes:
        text: Index of the text in its request.
        caches: Its caches.
        count: Number of tokens in them.
        sums: Weighted sums of their hidden states (modes x 1 x size).
    """

    text: int
    caches: Caches
    count: int
    sums: mx.array


class TextRows:
    """The texts of the requests to embed, of which each has at most one text in part.

    Args:
        model: Computes the vectors.
    """

    def __init__(self, model: TextModel) -> None:
        self._model = model
        self._texts: dict[int, Sequence[Sequence[int]]] = {}
        self._parts: dict[int, _Part] = {}

    def add(self, row: int, texts: Sequence[Sequence[int]]) -> None:
        """Add the texts of a request."""
        self._texts[row] = texts

    def remove(self, rows: Collection[int]) -> None:
        """Forget requests, and free the caches of their texts. No-op for others."""
        for row in rows:
            self._texts.pop(row, None)
            self._parts.pop(row, None)

    @property
    def held_counts(self) -> list[int]:
        """Number of tokens of each text with caches."""
        return [part.count for part in self._parts.values()]

    def held_after(self, chunks: Sequence[TextChunk]) -> int:
        """Return the tokens in a text's caches after a chunk; 0 for several texts in a call."""
        if len(chunks) > 1:
            return 0
        part = self._parts.get(chunks[0].row)
        return chunks[0].count + (part.count if part else 0)

    def run(self, chunks: Sequence[TextChunk]) -> list[Embedded | NotFinite]:
        """Evaluate chunks in one call; return the vectors of the completed texts."""
        first, is_joined = chunks[0], len(chunks) > 1
        part = None if is_joined else self._parts.pop(first.row, None)
        begin = part.count if part else 0
        texts = [self._texts[chunk.row][chunk.text] for chunk in chunks]
        ids = [
            list(text[begin : begin + chunk.count])
            for text, chunk in zip(texts, chunks, strict=True)
        ]
        # Whole texts that share a call need no caches, which would take memory for 256 tokens each.
        caches = part.caches if part else None if is_joined else self._model.new_caches()
        sums = self._evaluate(ids, begin, [len(text) for text in texts], caches)
        if part:
            sums = sums + part.sums
        if first.is_last or caches is None:
            return self._vectors(chunks, sums)
        mx.eval(sums)
        evaluate(caches)
        self._parts[first.row] = _Part(first.text, caches, begin + first.count, sums)
        return []

    def _evaluate(
        self, ids: Sequence[list[int]], begin: int, lengths: Sequence[int], caches: Caches | None
    ) -> mx.array:
        """Return the weighted sums of the hidden states of some tokens (modes x texts x size).

        Texts are padded on the right, which no earlier token sees, each with its own last token,
        whose states are as finite as the text's.
        """
        longest = max(map(len, ids))
        tokens = mx.array([own + own[-1:] * (longest - len(own)) for own in ids])
        states = self._model.body(tokens, cache=caches).astype(mx.float32)
        return mx.stack(
            [
                # Not a product of matrices, which GPUs compute with fewer bits.
                mx.sum(states * _weights(mode, ids, begin, lengths)[..., None], axis=1)
                for mode in self._model.pooling
            ]
        )

    def _vectors(self, chunks: Sequence[TextChunk], sums: mx.array) -> list[Embedded | NotFinite]:
        """Return the vectors of texts, or a failure for a vector with NaN or infinity."""
        vectors = mx.concatenate([*sums], axis=-1)
        if self._model.normalizes:
            sizes = mx.linalg.norm(vectors, axis=-1, keepdims=True)
            vectors = vectors / mx.maximum(sizes, _LEAST_LENGTH)
        are_finite = mx.all(mx.isfinite(vectors), axis=-1)
        mx.eval(vectors, are_finite)
        kept = cast("list[bool]", are_finite.tolist())
        return [
            Embedded(chunk.row, chunk.text, _floats(vector)) if is_kept else NotFinite(chunk.row)
            for chunk, vector, is_kept in zip(chunks, vectors, kept, strict=True)
        ]


def _floats(vector: mx.array) -> array[float]:
    # MLX has the buffer protocol, but its stubs do not say so.
    return array("f", memoryview(cast("Any", vector)).tobytes())


def _weights(
    mode: str, ids: Sequence[Sequence[int]], begin: int, lengths: Sequence[int]
) -> mx.array:
    """Return the weight of each token in a vector (texts x longest), 0 for padding.

    Args:
        mode: The mode of pooling.
        ids: The tokens evaluated, of each text.
        begin: Position of the first of them in its text.
        lengths: Number of tokens of each whole text.
    """
    longest = max(map(len, ids))
    rows = [
        [_weight(mode, begin + index, length) for index in range(len(own))]
        + [0.0] * (longest - len(own))
        for own, length in zip(ids, lengths, strict=True)
    ]
    return mx.array(rows, dtype=mx.float32)


def _weight(mode: str, position: int, length: int) -> float:
    match mode:
        case "cls":
            return float(position == 0)
        case "lasttoken":
            return float(position == length - 1)
        case "mean":
            return 1 / length
        case "mean_sqrt_len_tokens":
            return 1 / math.sqrt(length)
        case "weightedmean":
            return (position + 1) / (length * (length + 1) / 2)
    raise ValueError(f"unknown mode of pooling: {mode!r}")
