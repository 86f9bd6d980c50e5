"""Whether two rows were computed alike, where near-ties may make their tokens differ."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from runner_server.engine.types import TokenLogprob


def assert_alike(
    some: Sequence[TokenLogprob], others: Sequence[TokenLogprob], tolerance: float = 2e-3
) -> None:
    """Compares likelihoods up to the first token that differs.

    Random weights make near-ties, which rounding decides: a batch's is not that of a
    single row. Until then every likelihood must be the same.
    """
    for a, b in zip(some, others, strict=False):
        values, same = dict(a.top), dict(b.top)
        common = set(values) & set(same)
        assert len(common) >= len(values) * 3 // 4
        for id_ in common:
            assert values[id_] == pytest.approx(same[id_], abs=tolerance)
        if a.token_id != b.token_id:
            # They were as likely as each other, or else it was no near-tie.
            assert values[a.token_id] == pytest.approx(same[b.token_id], abs=tolerance)
            return
        assert a.logprob == pytest.approx(b.logprob, abs=tolerance)
