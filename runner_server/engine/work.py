"""Work items, which the scheduler plans and the executor runs, and the reports of their results.

Both are plain data; rank 0 sends items to the other ranks. For a prompt of 100 tokens, 40 of which
are in the prefix cache:

1. ``PrefillItem((PromptChunk(row, restored=40, count=59, is_stored=True),))``: the executor copies
   the KV caches of 40 tokens and prefills the next 59. The first decode step takes the last token
   as its input.
2. ``DecodeItem(joining=(row,))``: the row joins the batch, and the step samples its first token.
3. ``DecodeItem()``: one more token for each row of the batch.
4. ``DecodeItem(draft=(7, 8, 9))``: the only row of the batch is likely to continue with these. If
   it does with 7 and 8, the step reports them and the token that comes instead of 9.
5. ``DraftPrefillItem(row, 0, 64)``, several times, and then ``DecodeItem(proposed=4)``: the draft
   model prefills the text of the only row, and proposes the next four tokens.

Texts to embed have no rows in the batch. For a request with texts of 12 and 10 tokens,
``EmbedItem((TextChunk(row, text=0, count=12, is_last=True), TextChunk(row, text=1, ...)))``
evaluates both, and reports their vectors.
"""

from __future__ import annotations

from dataclasses import dataclass

from runner_server.engine.embedding.types import Embedded
from runner_server.engine.logprobs import PromptLogprobs
from runner_server.engine.types import Failure, Token


@dataclass(frozen=True)
class PromptChunk:
    """The next tokens of one prompt.

    Attributes:
        row: Id of the row.
        restored: Length of the prefix to restore from the prefix cache first; 0 = none.
        count: Tokens to prefill after that prefix.
        is_stored: Whether to store the prefix reached in the prefix cache.
    """

    row: int
    restored: int
    count: int
    is_stored: bool


@dataclass(frozen=True)
class PrefillItem:
    """Chunks to prefill in one call of the model.

    Attributes:
        chunks: At least one. If there are several, they all start at the same position and reach
            the end of their prompts.
    """

    chunks: tuple[PromptChunk, ...]


@dataclass(frozen=True)
class DecodeItem:
    """One decode step.

    Attributes:
        joining: Rows that join the batch before the step: prefilled ones and resumed ones.
        expected: Number of further rows likely to join soon. The executor may allocate memory for
            them in advance.
        draft: Tokens that are likely to follow those reported of the only row; none of them may be
            longer than the context. The step checks them in one call of the model.
        proposed: Number of tokens that the draft model proposes for the only row, to be checked as
            its draft; it prefills the missing tokens of the text first. Not with ``draft``.
    """

    joining: tuple[int, ...] = ()
    expected: int = 0
    draft: tuple[int, ...] = ()
    proposed: int = 0


@dataclass(frozen=True)
class DraftPrefillItem:
    """The next tokens of a row's text, to be prefilled by the draft model.

    Attributes:
        row: Id of the row, the only one of the batch.
        start: Position of the first token. The draft model begins anew, without the tokens before,
            unless it has just read these.
        count: Number of tokens, at most those reported.
    """

    row: int
    start: int
    count: int


@dataclass(frozen=True)
class PromoteItem:
    """The next part of a prompt's prefix, to be copied from disk to the prefix cache in memory.

    Attributes:
        row: Id of the row.
    """

    row: int


@dataclass(frozen=True)
class TextChunk:
    """The next tokens of one text to embed.

    Attributes:
        row: Id of the request.
        text: Index of the text in the request.
        count: Tokens to evaluate after those of earlier chunks of the text.
        is_last: Whether they end the text, so that the report has its vector.
    """

    row: int
    text: int
    count: int
    is_last: bool


@dataclass(frozen=True)
class EmbedItem:
    """Texts to evaluate in one call of the model.

    Attributes:
        chunks: At least one. If there are several, each is a whole text, the first the longest.
    """

    chunks: tuple[TextChunk, ...]


WorkItem = PrefillItem | DecodeItem | DraftPrefillItem | PromoteItem | EmbedItem


@dataclass(frozen=True)
class WorkReport:
    """Result of a work item.

    Attributes:
        seconds: Duration of the work itself.
        waited_seconds: Time spent before it, waiting for a decode step launched earlier.
        events: At most one for each row, or several tokens of one row with a draft, and one for
            each text that an ``EmbedItem`` completes; a vector that is not finite is a failure of
            its row. The second step of a row yields none: from then on each step is launched
            before the tokens of the previous one are read.
        drafted: Number of drafted tokens checked; 0 if the first one was already wrong.
        prompt_logprobs: The log probabilities computed by a ``PrefillItem`` with one chunk, of a
            row that requests them.
        is_promoting: Whether the prompt of a ``PromoteItem`` has more of its prefix on disk.
    """

    seconds: float
    waited_seconds: float = 0.0
    events: tuple[Token | Embedded | Failure, ...] = ()
    drafted: int = 0
    prompt_logprobs: PromptLogprobs | None = None
    is_promoting: bool = False
