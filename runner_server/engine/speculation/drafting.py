"""Number of tokens to draft, by the time that earlier drafts have cost and saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from runner_server.engine.speculation.prompt_lookup import PromptLookup

_FIRST_CREDIT = 1.0
_CREDIT_PER_TOKEN = 0.01
_MOST_CREDIT = 8.0

_FEWEST = 2
"""Fewest tokens worth a draft, whose step is not launched before the last one has ended."""

_FIRST_COST = 0.5
"""Cost of a drafted token before any is measured, in steps: the first draft has two tokens."""

_LEAST_COST, _MOST_COST = 1 / 64, _MOST_CREDIT / _FEWEST
"""Bounds of the cost of a drafted token, in steps. The upper one is that of a draft which takes all
credit: with more, after a draft that was held up (by a suspended machine, for example), no row
would ever draft again, and so never find out that the cost is lower."""

_DECAY = 0.8
"""Weight of the past in the measured durations."""


@dataclass
class _Row:
    """A row whose tokens may be drafted.

    Attributes:
        lookup: The text of the row.
        max_length: Most tokens in the sequence, prompt included.
        credit: What drafts may lose from now on, in steps.
    """

    lookup: PromptLookup
    max_length: int
    credit: float = _FIRST_CREDIT

    def limit(self, cost: float) -> int:
        """Return the most tokens to draft now, if each costs ``cost`` steps."""
        # The step draws one token more than it checks.
        left = self.max_length - len(self.lookup) - 1
        return max(0, min(left, int(self.credit / cost)))


@dataclass
class _Pace:
    """Durations of the steps of a row alone, in which older ones weigh less.

    Attributes:
        seconds: Duration of the steps without a draft.
        tokens: Tokens that they have yielded.
        cost: Duration that a drafted token adds to a step, in steps.
    """

    seconds: float = 0.0
    tokens: float = 0.0
    cost: float = _FIRST_COST

    @property
    def step_seconds(self) -> float | None:
        """Duration of a step without a draft; None before the first two."""
        return self.seconds / self.tokens if self.tokens > 1 else None

    def add_step(self, seconds: float, tokens: int) -> None:
        """Record a step without a draft, and the tokens of the step before."""
        self.seconds = _DECAY * self.seconds + seconds
        self.tokens = _DECAY * self.tokens + tokens

    def add_draft(self, drafted: int, steps: float) -> None:
        """Record a step with a draft, which took as long as ``steps`` others."""
        cost = min(max((steps - 1) / drafted, _LEAST_COST), _MOST_COST)
        self.cost = _DECAY * self.cost + (1 - _DECAY) * cost


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
    """

    most: int = 0
    _rows: dict[int, _Row] = field(default_factory=dict)
    _pace: _Pace = field(default_factory=_Pace)

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
        if known is None or self._pace.step_seconds is None:
            return ()
        limit = min(self.most, known.limit(self._pace.cost))
        if limit < _FEWEST:
            return ()
        matched, ids = known.lookup.continuation(limit)
        return ids[:matched]

    def record(self, tokens: dict[int, list[int]]) -> None:
        """Record the tokens of a step, by row."""
        for row, ids in tokens.items():
            if known := self._rows.get(row):
                known.lookup.extend(ids)
                known.credit = min(_MOST_CREDIT, known.credit + _CREDIT_PER_TOKEN * len(ids))

    def record_alone(self, row: int, drafted: int, yielded: int, seconds: float) -> None:
        """Record the duration of a step with one row in the batch.

        Args:
            row: Id of the row.
            drafted: Number of tokens checked; 0 without a draft.
            yielded: Number of tokens reported.
            seconds: Duration of the step.
        """
        if not drafted:
            self._pace.add_step(seconds, yielded)
        elif (step := self._pace.step_seconds) and (known := self._rows.get(row)):
            self._pace.add_draft(drafted, seconds / step)
            known.credit = min(_MOST_CREDIT, known.credit + yielded - seconds / step)
