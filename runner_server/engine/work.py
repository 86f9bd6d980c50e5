"""Work items: what the scheduler tells the executor to do, and what it learns from the result.

Plain data that can be sent to other ranks. For a prompt of 100 tokens, 40 of which another prompt
has left in the prefix cache:

1. ``PrefillItem((PromptChunk(row, restored=40, count=59, is_stored=True),))``: the executor copies
   the KV caches of 40 tokens and prefills the next 59. The last token is left to the decode step.
2. ``DecodeItem(joining=(row,))``: the row joins the batch, and the step draws its first token.
3. ``DecodeItem()``: one more token for each row of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

from runner_server.engine.types import NotFinite, Token


@dataclass(frozen=True)
class PromptChunk:
    """The next tokens of one prompt.

    Attributes:
        row: Id of the row.
        restored: Length of the prefix to restore from the prefix cache first; 0 = none.
        count: Tokens to prefill after it.
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
        chunks: At least one. Several chunks start at the same position of their prompts and reach
            the end.
    """

    chunks: tuple[PromptChunk, ...]


@dataclass(frozen=True)
class DecodeItem:
    """One decode step.

    Attributes:
        joining: Rows that join the batch before the step: prefilled ones and resumed ones.
        expected: How many more rows will join soon, for which memory may be allocated too.
    """

    joining: tuple[int, ...] = ()
    expected: int = 0


WorkItem = PrefillItem | DecodeItem


@dataclass(frozen=True)
class WorkReport:
    """Result of a work item.

    Attributes:
        seconds: Time of the work.
        waited_seconds: Time before it spent waiting for a decode step launched earlier.
        events: Tokens of the rows that have one. A row in its second step has none, because from
            then on a step is launched before the previous one is read.
    """

    seconds: float
    waited_seconds: float = 0.0
    events: tuple[Token | NotFinite, ...] = ()
