"""Proposal of the next tokens of a row by a draft model."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import cast

import mlx.core as mx
from mlx.nn.layers.base import Module

from runner_server.mlx_backend.cache.row_caches import CachePieces, Caches, cut_back, evaluate

_MOST_BEHIND = 32
"""Most tokens that a proposal or a chunk prefills in addition. The scheduler plans a prefill of
more."""


@dataclass(frozen=True, eq=False)
class DraftModel:
    """A draft model with weights in memory.

    Attributes:
        module: The model.
        pieces: Creates its caches, which can be cut back.
        vocab_size: Number of token ids scored by its output layer.
    """

    module: Module
    pieces: CachePieces
    vocab_size: int


class Proposer:
    """Follows the text of one row at a time with a draft model, and proposes what comes next.

    The draft model may lack the beginning of the text: wrong proposals only cost time.

    Args:
        draft_model: The draft model.
        vocab_size: Number of token ids that the target scores, which may differ although both have
            the same tokens.
    """

    def __init__(self, draft_model: DraftModel, vocab_size: int) -> None:
        self._model = draft_model.module
        self._pieces = draft_model.pieces
        self._known_ids = draft_model.vocab_size
        self._proposed_ids = min(draft_model.vocab_size, vocab_size)
        self._row: int | None = None
        self._caches: Caches = []
        # Position of the next input, and the evaluated guesses after it.
        self._end = 0
        self._guessed: list[int] = []

    def prefill(self, row: int, text: Sequence[int], start: int, count: int) -> None:
        """Prefill the next tokens of a row's text.

        Args:
            row: Id of the row.
            text: The text, as far as the target has evaluated it.
            start: Position of the first token. The draft model begins anew there unless it has
                prefilled those before, or nearly.
            count: Number of tokens.
        """
        self._settle(row, text)
        if self._row != row or start - self._end > _MOST_BEHIND:
            self._begin(row, start)
        if ids := text[self._end : start + count]:
            self._model(self._inputs(ids), cache=self._caches)
            evaluate(self._caches)
            self._end += len(ids)

    def propose(self, row: int, text: Sequence[int], last: int, count: int) -> list[int]:
        """Return the most likely tokens after a text, by the draft model.

        Args:
            row: Id of the row.
            text: The text, as far as the target has evaluated it.
            last: The token after it.
            count: Number of tokens to propose.

        Returns:
            The tokens; none if the draft model lacks too much of the text.
        """
        self._settle(row, text)
        if self._row != row:
            self._begin(row, 0)
        if len(text) - self._end > _MOST_BEHIND:
            return []
        inputs = self._inputs([*text[self._end :], last])
        tokens: list[mx.array] = []
        for _ in range(count):
            logits = self._model(inputs, cache=self._caches)[:, -1, : self._proposed_ids]
            inputs = mx.argmax(logits, axis=-1, keepdims=True)
            tokens.append(inputs)
            mx.async_eval(inputs)
        proposed = cast("list[int]", mx.concatenate(tokens, axis=1)[0].tolist())
        self._end = len(text) + 1
        self._guessed = proposed[:-1]
        return proposed

    def drop(self, rows: Collection[int]) -> None:
        """Free the caches if one of these rows is the one followed."""
        if self._row in rows:
            self.close()

    def close(self) -> None:
        """Free the caches."""
        self._row, self._caches, self._guessed = None, [], []

    def _begin(self, row: int, start: int) -> None:
        self._row, self._end, self._guessed = row, start, []
        self._caches = self._pieces.new()

    def _settle(self, row: int, text: Sequence[int]) -> None:
        """Cut the caches back to the text and the guesses that came true."""
        if self._row != row:
            return
        right = 0
        for guess, token in zip(self._guessed, text[self._end :], strict=False):
            if guess != token:
                break
            right += 1
        # The token after the text is evaluated anew, as is usual, if no draft was checked.
        extra = max(0, self._end + right - len(text))
        cut_back(self._caches, len(self._guessed) - right + extra)
        self._end += right - extra
        self._guessed = []

    def _inputs(self, ids: Sequence[int]) -> mx.array:
        # Ids beyond the tokens, which some output layers score, are unknown to smaller models.
        known = [id_ if id_ < self._known_ids else 0 for id_ in ids]
        return mx.array([known], dtype=mx.uint32)
