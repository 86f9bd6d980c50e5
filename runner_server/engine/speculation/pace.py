"""Durations of steps with and without drafts."""

from __future__ import annotations

from dataclasses import dataclass

FEWEST = 2
"""Fewest tokens worth a draft, whose step is not launched before the last one has ended."""

FIRST_CREDIT = 1.0
CREDIT_PER_TOKEN = 0.01
MOST_CREDIT = 8.0
"""Steps that the drafts of a row may lose: at first, more for each token, and with all gains."""

_DECAY = 0.8
"""Weight of the past in the measured durations."""

_LEAST_COST, _MOST_COST = 1 / 64, MOST_CREDIT / FEWEST
"""Bounds of the cost of a drafted token, in steps. The upper one is that of a draft which takes all
credit: with more, after a draft that was held up (by a suspended machine, for example), no row
would ever draft again, and so never find out that the cost is lower."""


@dataclass
class Pace:
    """Durations of the steps of a row alone, in which older ones weigh less.

    Attributes:
        seconds: Duration of the steps without a draft.
        tokens: Tokens that they have yielded.
        begun: Share of the step in flight whose time has passed in a step that yielded no token:
            nearly 0 on a GPU, and 1 on a CPU, which computes a step while launching it.
    """

    seconds: float = 0.0
    tokens: float = 0.0
    begun: float = 1.0

    @property
    def step_seconds(self) -> float | None:
        """Duration of a step without a draft; None before the first two."""
        return self.seconds / self.tokens if self.tokens > 1 else None

    def add_step(self, seconds: float, tokens: int) -> None:
        """Record a step without a draft, and the tokens of the step before."""
        if not tokens:
            # The first one after a draft.
            self.begun = min(1.0, seconds / self.step_seconds) if self.step_seconds else 1.0
            return
        self.seconds = _DECAY * self.seconds + seconds
        self.tokens = _DECAY * self.tokens + tokens

    def steps_of_draft(self, seconds: float, accepted: int, yielded: int) -> float:
        """Return the duration of a step with a draft, without that of the step in flight before.

        Returns:
            The number of steps, at least 1: a shorter one is due to the load of the machine while
            steps were measured. 1 if no steps were.
        """
        if self.step_seconds is None:
            return 1.0
        has_waited = yielded > accepted + 1
        return max(1.0, seconds / self.step_seconds - has_waited * (1 - self.begun))


@dataclass
class DraftCost:
    """Duration that a drafted token adds to a step, in steps.

    Attributes:
        steps: The mean, in which older durations weigh less. Before any is measured, the first
            draft has two tokens.
    """

    steps: float = 0.5

    def add(self, drafted: int, steps: float) -> None:
        """Record a step with a draft, which took as long as ``steps`` others."""
        cost = min(max((steps - 1) / drafted, _LEAST_COST), _MOST_COST)
        self.steps = _DECAY * self.steps + (1 - _DECAY) * cost


@dataclass
class Credit:
    """Time left for drafts to lose, in steps.

    Attributes:
        steps: The time; below 0 if the last draft lost more than expected.
        most: Most of it that can be saved up.
    """

    steps: float
    most: float

    def add(self, steps: float) -> None:
        """Add steps gained or passed; negative ones are lost."""
        self.steps = min(self.most, self.steps + steps)
