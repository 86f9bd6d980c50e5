"""Prefill and proposals of a draft model, within the time saved by earlier drafts."""

from __future__ import annotations

import math
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

_TRIAL_STEPS = 3.0
"""Time lost to a draft model at most before the first gain, once for each load."""

_MOST_SAVED_STEPS = 64.0
"""Most of the gains kept for later losses: about the prefill of one long prompt."""

_FIRST_CHUNK = 8
"""Tokens of the first chunk, whose duration is measured."""

_FIRST_CHUNK_STEPS = 1.0
"""Steps assumed for the first chunk; a draft model is faster than its target."""

_MOST_LAG = 8
"""Most tokens to prefill within a step with a draft."""

_WORTH = 8.0
"""Tokens still to be generated for each step that the prefill of a text may take."""

_FEWEST_TOKENS = 32
"""Fewest last tokens of a text worth a prefill."""

_MOST_COST = 2.0
"""Steps that a proposed token takes at most: one of each model."""

_DRAFTS_UNMEASURED, _WRONG_UNMEASURED, _STEPS_MEASURED = 64, 2, 3
"""Drafts in a row, and wrong ones, after which some steps without one are measured again. Gains are
relative to their duration, which changes with the length of the text and the load of the machine.
"""

_ROW_MEMORY, _MODEL_MEMORY = 0.9, 0.98
"""Weight of the past in the rate of right tokens, of one row and of the model."""


@dataclass
class _Guesses:
    """Right and wrong tokens of a draft model, in which older ones weigh less."""

    right: float
    wrong: float

    @property
    def rate(self) -> float:
        """Chance of a token to be right after right ones."""
        return self.right / (self.right + self.wrong)

    def add(self, right: int, wrong: int, memory: float) -> None:
        """Record the tokens of a draft up to the first wrong one."""
        self.right = memory * self.right + right
        self.wrong = memory * self.wrong + wrong


@dataclass
class _Row:
    """A row whose next tokens a draft model may propose.

    Attributes:
        prompt_length: Tokens of the prompt.
        length: Tokens of the text.
        max_length: Most tokens of the text.
        guesses: The draft model's guesses for this row, beginning with its usual rate.
        prefilled: Tokens of the text up to the end of the draft model's caches.
        credit: Time to lose by drafts.
    """

    prompt_length: int
    length: int
    max_length: int
    guesses: _Guesses
    prefilled: int = 0
    credit: Credit = field(default_factory=lambda: Credit(FIRST_CREDIT, MOST_CREDIT))

    @property
    def left(self) -> int:
        """Most tokens to be generated from now on."""
        return self.max_length - self.length


@dataclass
class ModelDrafting:
    """Plans the prefill and the proposals of a draft model, as long as these save time.

    The draft model prefills the text of a row before it proposes tokens. The chunks run between
    decode steps and take about as long as a step each. Their time is paid from savings that
    all rows share: three steps after the load, 1 % of the time as it passes, and what drafts have
    gained. If the whole text would take longer, or more than an eighth of the steps still to come,
    the draft model gets only its end. So a model whose drafts are wrong loses three steps, and 1 %
    of the time later.

    Drafts that turn out wrong are paid from the savings, and from a credit of each row, as with
    :class:`Drafting`. A draft has the length with the most tokens to be expected for its time, by
    the draft model's rate of right tokens in this row.

    Attributes:
        most: Most tokens of a draft.
        max_chunk: Most tokens of a chunk.
        max_length: Longest text that the draft model supports, in tokens.
        pace: Durations of the steps without a draft.
    """

    most: int
    max_chunk: int
    max_length: int
    pace: Pace
    _rows: dict[int, _Row] = field(default_factory=dict)
    _savings: Credit = field(default_factory=lambda: Credit(_TRIAL_STEPS, _MOST_SAVED_STEPS))
    _cost: DraftCost = field(default_factory=DraftCost)
    _chunk_cost: float | None = None
    _followed: int | None = None
    _unmeasured: int = 0
    _guesses: _Guesses = field(default_factory=lambda: _Guesses(1.4, 0.6))

    def add(self, row: int, prompt_length: int, max_tokens: int) -> None:
        """Add a row whose tokens may be proposed; see ``Drafting.add``."""
        most = min(prompt_length + max_tokens, self.max_length)
        rate = self._guesses.rate
        self._rows[row] = _Row(
            prompt_length, prompt_length, most, _Guesses(2 * rate, 2 * (1 - rate))
        )

    def remove(self, row: int) -> None:
        """Remove a row. No-op if unknown."""
        self._rows.pop(row, None)

    def next_chunk(self, row: int) -> tuple[int, int]:
        """Return the chunk of a row's text for the draft model to prefill before the next step.

        Returns:
            The token of the text to begin with, and the number of tokens; 0 = none.
        """
        known, step = self._rows.get(row), self.pace.step_seconds
        if known is None or step is None or self._limit(known) < FEWEST:
            return 0, 0
        lag = self._lag(row, known)
        if lag <= _MOST_LAG:
            return known.prefilled, 0
        begin = known.length - lag
        is_behind = begin >= known.prompt_length
        steps = min(self._savings.steps, known.credit.steps if is_behind else math.inf)
        if self._chunk_cost is None:
            return 0, _FIRST_CHUNK if steps >= _FIRST_CHUNK_STEPS else 0
        steps = min(steps - FEWEST * self._cost.steps, known.left / _WORTH)
        affordable = int(steps / self._chunk_cost)
        if affordable < (lag if is_behind else min(lag, _FEWEST_TOKENS)):
            return 0, 0
        known.prefilled, self._followed = max(begin, known.length - affordable), row
        most = max(_FIRST_CHUNK, int(1 / self._chunk_cost))
        # Not the last token, which may be the input of the step in flight.
        return known.prefilled, min(known.length - 1 - known.prefilled, self.max_chunk, most)

    def proposal(self, row: int) -> int:
        """Return how many tokens the draft model proposes for a row's next step; 0 = none."""
        known = self._rows.get(row)
        if known is None or self.pace.step_seconds is None or self._lag(row, known) > _MOST_LAG:
            return 0
        limit = self._limit(known)
        if limit < FEWEST or self._unmeasured >= _DRAFTS_UNMEASURED:
            return 0
        rate = known.guesses.rate
        best, most_gained, expected = 0, 0.0, 1.0
        for count in range(1, limit + 1):
            expected += rate**count
            gained = expected / (1 + count * self._cost.steps)
            if count >= FEWEST and gained > most_gained:
                best, most_gained = count, gained
        return best

    def record(self, tokens: dict[int, list[int]]) -> None:
        """Record the tokens of a step, by row."""
        for row, ids in tokens.items():
            if known := self._rows.get(row):
                known.length += len(ids)
                known.credit.add(CREDIT_PER_TOKEN * len(ids))
                self._savings.add(CREDIT_PER_TOKEN * len(ids))

    def record_step(self, yielded: int) -> None:
        """Record a step of a row alone without a draft, and the number of its tokens."""
        if self._unmeasured >= _DRAFTS_UNMEASURED:
            self._unmeasured += yielded
        if self._unmeasured >= _DRAFTS_UNMEASURED + _STEPS_MEASURED:
            self._unmeasured = 0

    def record_prompts(self, seconds: float) -> None:
        """Record the duration of work on prompts."""
        if step := self.pace.step_seconds:
            self._savings.add(CREDIT_PER_TOKEN * seconds / step)

    def record_chunk(self, row: int, count: int, seconds: float) -> None:
        """Record the duration of a chunk of the draft model."""
        known, step = self._rows.get(row), self.pace.step_seconds
        if known is None or step is None:
            return
        steps = seconds / step
        self._savings.add(-steps)
        if known.prefilled >= known.prompt_length:
            known.credit.add(-steps)
        # A call takes time of its own, so the first, short one is forgotten soon.
        last = steps / count
        self._chunk_cost = last if self._chunk_cost is None else (self._chunk_cost + last) / 2
        known.prefilled += count
        self._followed = row

    def record_draft(
        self, row: int, proposed: int, accepted: int, yielded: int, seconds: float
    ) -> None:
        """Record a step with a draft of the draft model.

        Args:
            row: Id of the row, which was alone.
            proposed: Number of tokens to be proposed.
            accepted: Number of tokens that were right.
            yielded: Number of tokens reported.
            seconds: Duration of the step, with that of the draft model.
        """
        known = self._rows.get(row)
        if known is None:
            return
        self._unmeasured += 1 if accepted else _DRAFTS_UNMEASURED // _WRONG_UNMEASURED
        steps = self.pace.steps_of_draft(seconds, accepted, yielded)
        # More is due to the load of the machine, from which steps suffer as well.
        steps = min(steps, 1 + _MOST_COST * proposed)
        self._cost.add(proposed, steps)
        gained = accepted + 1 - steps
        known.credit.add(gained)
        self._savings.add(gained)
        wrong = int(accepted < proposed)
        known.guesses.add(accepted, wrong, _ROW_MEMORY)
        self._guesses.add(accepted, wrong, _MODEL_MEMORY)
        known.prefilled, self._followed = known.length, row

    def _limit(self, known: _Row) -> int:
        """Return the most tokens to draft now."""
        steps = min(known.credit.steps, self._savings.steps)
        # The step draws one token more than it checks.
        return max(0, min(self.most, known.left - 1, int(steps / self._cost.steps)))

    def _lag(self, row: int, known: _Row) -> int:
        """Return the number of tokens left for the draft model to prefill."""
        return known.length - (known.prefilled if self._followed == row else 0)
