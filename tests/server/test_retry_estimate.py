"""Retry delay of a full queue."""

from __future__ import annotations

import pytest

from runner_server.engine.health.retry_estimate import RetryEstimate

PARALLEL = 8
QUEUED = 1000


def _estimate(seconds: float, late: int = 0, before: int = 500) -> float:
    """Return the delay after ``before`` requests of ``seconds`` and ``late`` requests of 0.4 s."""
    estimate = RetryEstimate()
    for _ in range(before):
        estimate.record(seconds, PARALLEL)
    for _ in range(late):
        estimate.record(0.4, PARALLEL)
    return estimate.seconds(QUEUED, PARALLEL)


def test_one_delayed_batch_weighs_little() -> None:
    """Count late rows ending together as one observation instead of eight."""
    assert _estimate(0.01) == pytest.approx(1.25)
    # The late batch alone would give 50 s.
    assert _estimate(0.01, late=PARALLEL) < 50 / 4


def test_the_first_request_replaces_the_guess() -> None:
    assert _estimate(0.01, before=1) == pytest.approx(1.25)


def test_the_guess_is_a_second_for_each_request() -> None:
    assert RetryEstimate().seconds(16, 8) == pytest.approx(2)


def test_the_delay_is_bounded() -> None:
    assert _estimate(1e-6) == 0.1
    assert _estimate(100) == 60
