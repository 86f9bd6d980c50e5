"""Number of tokens to draft, by the time that earlier drafts have cost and saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from runner_server.engine.speculation.pace import (
    CREDIT_PER_TOKEN,
    FEWEST,
    FIRST_CREDIT,
    MOST_CREDIT,
    Credit,
    DraftCost,
    Pace,
)
from runner_server.engine.speculation.prompt_lookup import PromptLookup


@dataclass
class _Row:
    """A row whose tokens may be drafted.

    Attributes:
        lookup: The text of the row.
        max_length: Most tokens in the sequence, prompt included.
        credit: What drafts may lose.
    """

    lookup: PromptLookup
    max_length: int
    credit: Credit = field(default_factory=lambda: Credit(FIRST_CREDIT, MOST_CREDIT))

    def limit(self, cost: float) -> int:
        """Return the most tokens to draft now, if each costs ``cost`` steps."""
        # The step draws one token more than it checks.
        left = self.max_length - len(self.lookup) - 1
        return max(0, min(left, int(self.credit.steps / cost)))


@dataclass
class Drafting:
    """Drafts tokens for a row without others in its batch, as long as drafts save time.

    A step checks a draft of ``n`` tokens in little more time than it takes for one, as long as
    reading the weights takes most of it. It yields the tokens up to the first wrong one, and the
    right one in its place.

    Each row has a credit. A step with a draft that lasts as long as 1.6 others and yields 4 tokens
    gains 2.4 steps; if it yields 1, it loses 0.6. Losses are bounded by the credit: a row may lose
    one step at first, one for each 100 tokens later, and the gains of earlier drafts, at most eight
    steps. So a text that never repeats takes at most 1 % more time, and one step. The draft is as
    long as the match found by :class:`PromptLookup`, and grows while the match does.

    Attributes:
        most: Most tokens of a draft; 0 drafts none.
        pace: Durations of the steps without a draft.
    """

    most: int = 0
    pace: Pace = field(default_factory=Pace)
    _rows: dict[int, _Row] = field(default_factory=dict)
    _cost: DraftCost = field(default_factory=DraftCost)

    def add(self, row: int, prompt_ids: Sequence[int], max_tokens: int) -> None:
        """Add a row whose tokens may be drafted.

        Args:
            row: Id of the row.
            prompt_ids: The prompt.
            max_tokens: Most tokens to generate.
        """
        if self.most:
            self._rows[row] = _Row(PromptLookup(prompt_ids), len(prompt_ids) + max_tokens)

    def remove(self, row: int) -> None:
        """Remove a row. No-op if unknown."""
        self._rows.pop(row, None)

    def draft(self, row: int) -> tuple[int, ...]:
        """Return the draft for a row's next step; empty if a draft is unlikely to save time."""
        known = self._rows.get(row)
        if known is None or self.pace.step_seconds is None:
            return ()
        limit = min(self.most, known.limit(self._cost.steps))
        if limit < FEWEST:
            return ()
        matched, ids = known.lookup.continuation(limit)
        return ids[:matched]

    def record(self, tokens: dict[int, list[int]]) -> None:
        """Record the tokens of a step, by row."""
        for row, ids in tokens.items():
            if known := self._rows.get(row):
                known.lookup.extend(ids)
                known.credit.add(CREDIT_PER_TOKEN * len(ids))

    def record_alone(self, row: int, drafted: int, yielded: int, seconds: float) -> None:
        """Record the duration of a step with one row in the batch.

        Args:
            row: Id of the row.
            drafted: Number of tokens checked; 0 without a draft.
            yielded: Number of tokens reported.
            seconds: Duration of the step.
        """
        if not drafted:
            self.pace.add_step(seconds, yielded)
        elif (step := self.pace.step_seconds) and (known := self._rows.get(row)):
            # A shorter one is due to the load of the machine while steps were measured.
            steps = max(1.0, seconds / step)
            self._cost.add(drafted, steps)
            known.credit.add(yielded - steps)
