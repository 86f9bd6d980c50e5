"""Drawing of a token after each token of a draft, as if each were a row of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from runner_server.engine.types import Sampling
from runner_server.mlx_backend.constraints.matcher import GrammarMatcher, RowMatcher
from runner_server.mlx_backend.drawing import Agree, Drawing
from runner_server.mlx_backend.in_flight import InFlightStep
from runner_server.mlx_backend.sampling.constrained import ConstrainedSampler
from runner_server.mlx_backend.sampling.mask_rows import MaskRows
from runner_server.mlx_backend.sampling.penalties import Penalties
from runner_server.mlx_backend.sampling.row_logprobs import RowLogprobs
from runner_server.mlx_backend.sampling.sampler import Sampler


class DraftDrawing:
    """Draws a token after each token of a draft, with the options of one row.

    Args:
        sampling: The sampling options of the row.
        vocab_size: Number of token ids.
        mask_rows: Turns masks into what they add to logits.
        agree: Replaces drawn tokens with those of rank 0; None if there is one rank.
    """

    def __init__(
        self, sampling: Sampling, vocab_size: int, mask_rows: MaskRows, agree: Agree | None
    ) -> None:
        self._sampling = sampling
        self._vocab_size = vocab_size
        self._mask_rows = mask_rows
        self._agree = agree
        self._reads_history = Penalties([sampling]).reads_histories
        # Without constraints, by the number of tokens.
        self._drawings: dict[int, Drawing] = {}

    def __call__(
        self,
        logits: mx.array,
        history: Sequence[int],
        ids: Sequence[int],
        drawn: int,
        matchers: Sequence[GrammarMatcher],
    ) -> tuple[InFlightStep, list[RowLogprobs | None]]:
        """Launch the drawing of a token after each id; see ``Drawing.__call__``.

        Args:
            logits: The model's logits after each id, shape ``(ids, vocabulary)``.
            history: The tokens of the row before the first id.
            ids: The tokens that the logits follow.
            drawn: Number of tokens drawn in the row, including the first id.
            matchers: A matcher for each id, which has consumed it; empty without a constraint.
        """
        # Copies of a long history take milliseconds, and only penalties read them.
        histories = [
            [*history, *ids[:index]] if self._reads_history else () for index in range(len(ids))
        ]
        inputs = mx.array(list(ids), dtype=mx.uint32)
        drawing = self._drawing(len(ids), matchers)
        return drawing(logits, histories, inputs, range(drawn, drawn + len(ids)))

    def _drawing(self, count: int, matchers: Sequence[GrammarMatcher]) -> Drawing:
        options = [self._sampling] * count
        if matchers:
            sampler = ConstrainedSampler(options, matchers, self._vocab_size, self._mask_rows)
            return Drawing(options, sampler, self._agree)
        if count not in self._drawings:
            plain = Sampler(options, self._vocab_size)
            self._drawings[count] = Drawing(options, plain, self._agree)
        return self._drawings[count]


def matchers_of_draft(
    matcher: RowMatcher, unread: Sequence[int], draft: Sequence[int]
) -> list[GrammarMatcher]:
    """Return a matcher for each token to draw, before and after the tokens of a draft.

    Args:
        matcher: The matcher of the row, which stays as it is.
        unread: Tokens that it has not consumed yet.
        draft: The tokens expected after these.

    Returns:
        One more than tokens of the draft, or fewer: the constraint excludes the next token of the
        draft then. None at all if other rules than a grammar apply.
    """
    state = None if matcher.failure else matcher.fork()
    if state is None:
        return []
    for token in unread:
        state.consume(token)
    found: list[GrammarMatcher] = []
    for token in draft:
        if state.failure:
            return found
        found.append(state)
        state = state.fork()
        state.consume(token)
    return found if state.failure else [*found, state]
