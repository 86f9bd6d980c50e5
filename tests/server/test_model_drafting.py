"""Drafts of a draft model: they gain where it guesses well, and lose a bounded time elsewhere."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from runner_server.engine.speculation.model_drafting import ModelDrafting
from runner_server.engine.speculation.pace import Pace

STEP_SECONDS = 0.02
CHUNK = 128


@dataclass
class Simulation:
    """Rows decoded alone, one after another, with a draft model.

    Attributes:
        rate: Chance of a proposed token to be right.
        cost: Time that a proposed token adds to a step, in steps.
        read_cost: Time to prefill a token with the draft model, in steps.
        proposed: Number of tokens proposed for the last row.
        longest: Longest prefill between two steps, in steps.
    """

    rate: float
    cost: float = 0.1
    read_cost: float = 0.01
    proposed: int = 0
    longest: float = 0.0
    max_length: int = 10_000
    step_seconds: float = STEP_SECONDS

    def __post_init__(self) -> None:
        self.pace = Pace()
        self.drafting = ModelDrafting(16, CHUNK, self.max_length, self.pace)
        self.random = random.Random(1)  # noqa: S311 - test data
        self.rows = 0

    def run(self, prompt: int, count: int) -> float:
        """Return the time to generate ``count`` tokens, in steps."""
        row = self.rows = self.rows + 1
        self.drafting.add(row, prompt, count)
        steps, done, self.proposed = 0.0, 0, 0
        while done < count:
            _, chunk = self.drafting.next_chunk(row)
            if chunk:
                took = 0.1 + chunk * self.read_cost
                self.longest = max(self.longest, took)
                self.drafting.record_chunk(row, chunk, took * self.step_seconds)
                steps += took
            proposed = self.drafting.proposal(row)
            assert done + proposed < count
            right = 0
            while right < proposed and self.random.random() < self.rate:
                right += 1
            took = 1 + proposed * self.cost
            self.drafting.record({row: [7] * (right + 1)})
            if proposed:
                seconds = took * self.step_seconds
                self.drafting.record_draft(row, proposed, right, right + 1, seconds)
            else:
                self.pace.add_step(self.step_seconds, 1)
                self.drafting.record_step(1)
            steps, done, self.proposed = steps + took, done + right + 1, self.proposed + proposed
        self.drafting.remove(row)
        return steps


@pytest.mark.parametrize("prompt", [3, 60, 500])
def test_a_model_that_guesses_well_saves_half_of_the_steps(prompt: int) -> None:
    simulation = Simulation(rate=0.9, cost=0.1)
    simulation.run(60, 400)
    assert sum(simulation.run(prompt, 400) for _ in range(5)) < 5 * 400 / 2


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("cost", [0.1, 0.4, 1.0])
@pytest.mark.parametrize("prompt", [3, 60, 2000])
def test_a_model_that_guesses_badly_loses_little(rate: float, cost: float, prompt: int) -> None:
    simulation = Simulation(rate, cost)
    steps = sum(simulation.run(prompt, 200) for _ in range(20))
    # 1 % of the time, and three steps once; some pairs gain in spite of the rate.
    assert steps <= 1.01 * 20 * 200 + 3 + 2 * cost


def test_a_row_loses_no_more_than_its_credit_and_a_prefill() -> None:
    simulation = Simulation(rate=0.95)
    for _ in range(10):
        simulation.run(60, 400)
    simulation.rate = 0.0
    # One step, 1 %, the prefill of 100 tokens, and the last draft.
    assert simulation.run(100, 400) <= 400 * 1.01 + 1 + 1.5 + 16 * simulation.cost


def test_a_prompt_is_prefilled_in_parts_about_as_long_as_a_step() -> None:
    simulation = Simulation(rate=0.9)
    for _ in range(10):
        simulation.run(2000, 400)
    assert simulation.proposed
    assert simulation.longest < 1.5


def test_only_the_end_of_a_long_prompt_is_prefilled_if_the_whole_costs_too_much() -> None:
    simulation = Simulation(rate=0.95)
    for _ in range(5):
        simulation.run(60, 400)
    drafting = simulation.drafting
    for length, count in ((2000, 2000), (2000, 40)):
        drafting.add(0, length, count)
        start, chunk = drafting.next_chunk(0)
        assert chunk
        assert (start == 0) == (count == 2000)
        # An eighth of the steps still to come.
        assert (length - start) * simulation.read_cost <= count / 8
        drafting.remove(0)


def test_steps_are_measured_again_while_drafts_go_on() -> None:
    simulation = Simulation(rate=0.95)
    simulation.run(60, 2000)
    simulation.step_seconds = 0.5 * STEP_SECONDS
    simulation.run(60, 2000)
    assert simulation.pace.step_seconds == pytest.approx(0.5 * STEP_SECONDS, rel=0.2)


def test_wrong_guesses_gain_nothing_while_the_machine_gets_faster() -> None:
    simulation = Simulation(rate=0.0)
    total = 0.0
    for _ in range(20):
        # Drafts look short beside steps that were measured while it was busy.
        simulation.pace.add_step(50 * STEP_SECONDS, 10)
        total += simulation.run(60, 200)
    assert total <= 1.03 * 20 * 200


@pytest.mark.parametrize("is_computed_at_launch", [False, True])
def test_a_draft_lasts_as_long_wherever_the_step_in_flight_is_computed(
    is_computed_at_launch: bool,
) -> None:
    """A CPU computes it in the item that launches it, and a GPU while the next one waits."""
    pace = Pace()
    for _ in range(4):
        pace.add_step(STEP_SECONDS, 1)
    pace.add_step(STEP_SECONDS * is_computed_at_launch, 0)
    pace.add_step(STEP_SECONDS, 1)
    assert pace.step_seconds == pytest.approx(STEP_SECONDS)
    seconds = (1.4 + (not is_computed_at_launch)) * STEP_SECONDS
    assert pace.steps_of_draft(seconds, accepted=0, yielded=2) == pytest.approx(1.4)


def test_a_pause_of_the_machine_does_not_end_the_drafts() -> None:
    simulation = Simulation(rate=0.95)
    simulation.run(60, 400)
    simulation.drafting.add(0, 60, 400)
    simulation.drafting.record_draft(0, 2, 2, 3, 1000.0)
    assert simulation.run(60, 400) < 400 / 2


def test_no_tokens_are_proposed_beyond_what_the_draft_model_can_read() -> None:
    simulation = Simulation(rate=0.9, max_length=300)
    for _ in range(3):
        simulation.run(60, 200)
    assert simulation.proposed
    simulation.run(280, 200)
    assert simulation.proposed < 40
