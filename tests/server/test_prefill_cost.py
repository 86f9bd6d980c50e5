"""Estimates of the time of a prefill chunk, on machines of known cost."""

from __future__ import annotations

import pytest

from runner_server.engine.prefill_policy import PrefillCostModel


def test_there_is_no_estimate_before_the_first_chunk() -> None:
    assert PrefillCostModel().tokens_within(1.0) is None


def test_one_size_of_chunk_gives_a_plain_rate() -> None:
    cost = PrefillCostModel()
    for _ in range(50):
        cost.record(64, 0.1)
    assert cost.tokens_within(0.2) == pytest.approx(128, abs=1)


@pytest.mark.parametrize("constant", [0.0, 0.005, 0.03])
@pytest.mark.parametrize("per_token", [1e-5, 0.001])
def test_the_constant_part_is_separated_from_the_rest(constant: float, per_token: float) -> None:
    cost = PrefillCostModel()
    for tokens in (32, 64, 256, 128, 64):
        cost.record(tokens, constant + tokens * per_token)
    share = constant / (constant + 109 * per_token)
    if share < 0.5:
        assert cost.tokens_within(constant + 500 * per_token) == pytest.approx(500, rel=0.02)
    else:
        # If hardly any time depends on the tokens, many fit; the exact number is unknown.
        assert (cost.tokens_within(1.5 * (constant + 109 * per_token)) or 0) > 200


def test_without_time_for_the_constant_part_no_tokens_fit() -> None:
    cost = PrefillCostModel()
    for tokens in (32, 256, 32, 256):
        cost.record(tokens, 0.05 + tokens * 0.001)
    assert cost.tokens_within(0.01) == 0


def test_slower_later_chunks_are_not_taken_for_a_constant_part() -> None:
    """Chunks shrink as tokens get slower; a line fitted through them would allow far too many."""
    cost = PrefillCostModel()
    per_token = 0.0005
    worst = 1.0
    for _ in range(40):
        tokens = max(32, cost.tokens_within(0.25) or 32)
        cost.record(tokens, tokens * per_token)
        worst = max(worst, tokens * per_token / 0.25)
        per_token *= 1.05
    assert worst < 1.6


def test_a_machine_that_gets_ten_times_slower_is_noticed_within_a_few_chunks() -> None:
    cost = PrefillCostModel()
    for tokens in (100, 200, 150, 250):
        cost.record(tokens, tokens * 0.001)
    for _ in range(12):
        tokens = max(32, cost.tokens_within(0.25) or 32)
        cost.record(tokens, tokens * 0.01)
    assert max(32, cost.tokens_within(0.25) or 32) * 0.01 < 0.35
