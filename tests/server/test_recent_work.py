"""Sums and rates of the last minute, by a simulated clock."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner_server.engine.health.recent_work import RecentWork, SlidingSum


class Clock:
    """A clock that the test sets."""

    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        """Return the time."""
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock(1000.25)


def test_nothing_done_is_a_rate_of_zero(clock: Clock) -> None:
    work = RecentWork(clock)
    assert (work.tokens_per_second, work.cached_ratio) == (0, 0)
    clock.now += 3600
    assert (work.tokens_per_second, work.cached_ratio) == (0, 0)


def test_a_young_model_counts_from_its_load(clock: Clock) -> None:
    work = RecentWork(clock)
    work.note_generated(10)
    assert work.tokens_per_second == 0, "no time has passed"
    clock.now += 0.5
    work.note_generated(10)
    assert work.tokens_per_second == pytest.approx(40)
    clock.now += 9.5
    assert work.tokens_per_second == pytest.approx(2)


def test_a_steady_rate_is_reported_exactly(clock: Clock) -> None:
    work = RecentWork(clock)
    clock.now = 1000.0
    for _ in range(200):
        for _ in range(10):
            work.note_generated(3)
            clock.now += 0.1
        assert work.tokens_per_second == pytest.approx(30, rel=0.35)
    # The bucket under way is the 60th; the rate is that of 59 full ones.
    assert work.tokens_per_second == pytest.approx(30, rel=0.01)


def test_what_is_a_minute_old_is_forgotten(clock: Clock) -> None:
    work = RecentWork(clock)
    work.note_generated(100)
    work.note_prompt(50, 25)
    clock.now += 59.5
    assert work.tokens_per_second > 0
    assert work.cached_ratio == 0.5
    clock.now += 1
    assert (work.tokens_per_second, work.cached_ratio) == (0, 0)
    # The same bucket again, one round later.
    clock.now = 1060.5
    work.note_generated(6)
    assert work.tokens_per_second == pytest.approx(6 / 59.5)


def test_the_ratio_weighs_prompts_by_their_tokens(clock: Clock) -> None:
    work = RecentWork(clock)
    work.note_prompt(1000, 900)
    clock.now += 10
    work.note_prompt(100, 0)
    assert work.cached_ratio == pytest.approx(900 / 1100)


@given(st.lists(st.tuples(st.floats(0, 40), st.integers(0, 1000)), max_size=30), st.floats(0, 200))
def test_a_sum_is_that_of_the_59_to_60_last_seconds(
    steps: list[tuple[float, int]], rest: float
) -> None:
    now = 5.0
    window, added = SlidingSum(now), []
    for gap, amount in steps:
        now += gap
        window.add(amount, now)
        added.append((now, amount))
    now += rest
    total = window.total(now)
    assert sum(amount for at, amount in added if at > now - 59) <= total
    assert total <= sum(amount for at, amount in added if at > now - 60)
