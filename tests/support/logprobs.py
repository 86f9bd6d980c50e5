"""Comparison of log probabilities where near-ties may make tokens differ."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from runner_server.engine.logprobs import TokenLogprob


def assert_logprobs_close(
    some: Sequence[TokenLogprob], others: Sequence[TokenLogprob], tolerance: float = 2e-3
) -> None:
    """Compare log probabilities up to the first differing token.

    Random weights make near-ties, which rounding decides, and a batch rounds differently from a
    single row. Up to the first such token, the log probabilities must agree.
    """
    for a, b in zip(some, others, strict=False):
        values, same = dict(a.top), dict(b.top)
        common = set(values) & set(same)
        assert len(common) >= len(values) * 3 // 4
        for id_ in common:
            assert values[id_] == pytest.approx(same[id_], abs=tolerance)
        if a.token_id != b.token_id:
            # Tokens may differ only in a near-tie.
            assert values[a.token_id] == pytest.approx(same[b.token_id], abs=tolerance)
            return
        assert a.logprob == pytest.approx(b.logprob, abs=tolerance)
        assert dict(a.candidates) == pytest.approx(dict(b.candidates), abs=tolerance)
