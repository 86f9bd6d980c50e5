"""Statistics of the benchmark."""

from __future__ import annotations

import pytest

from bench.records import ContenderError, Prompt, Record, Request, longest_gap, rate
from bench.stats import common_prefix, percentile, summarize


def test_a_summary_is_median_and_spread() -> None:
    summary = summarize([5.0, 1.0, 2.0])
    assert (summary.median, summary.low, summary.high, summary.count) == (2.0, 1.0, 5.0, 3)


def test_summaries_need_at_least_one_value() -> None:
    with pytest.raises(ValueError, match="nothing was measured"):
        summarize([])
    with pytest.raises(ValueError, match="nothing was measured"):
        percentile([], 99)


@pytest.mark.parametrize(
    ("percent", "value"), [(0, 1), (50, 50), (99, 99), (99.5, 100), (100, 100)]
)
def test_a_percentile_is_a_measured_value(percent: float, value: float) -> None:
    assert percentile(list(range(100, 0, -1)), percent) == value


@pytest.mark.parametrize(
    ("left", "right", "length"),
    [([1, 2, 3], [1, 2, 4], 2), ([1, 2], [1, 2, 3], 2), ([], [1], 0), ([7], [8], 0)],
)
def test_the_common_prefix_ends_at_the_first_difference(
    left: list[int], right: list[int], length: int
) -> None:
    assert common_prefix(left, right) == length


def test_the_rate_counts_from_the_first_request_to_the_last_token() -> None:
    early = Record(sent=10.0, chunks=[(11.0, 1)], completion_tokens=30)
    late = Record(sent=10.5, chunks=[(11.0, 1), (12.0, 1)], completion_tokens=50)
    assert rate([early, late]) == pytest.approx(40.0)


def test_a_stream_is_counted_from_its_request() -> None:
    record = Record(sent=1.0, chunks=[(1.5, 1), (2.0, 2), (3.5, 1)], completion_tokens=4)
    assert record.ttft_seconds == pytest.approx(0.5)
    assert record.decode_rate == pytest.approx(1.5)


def test_the_longest_gap_includes_both_ends_of_the_interval() -> None:
    record = Record(chunks=[(0.0, 1), (1.0, 1), (1.2, 1)])
    assert longest_gap(record, 0.9, 5.0) == pytest.approx(3.8)
    assert longest_gap(record, 0.0, 1.2) == pytest.approx(1.0)


def test_a_stream_without_tokens_has_no_first_token() -> None:
    with pytest.raises(ContenderError, match="no token"):
        _ = Record(sent=1.0).ttft_seconds


@pytest.mark.parametrize(("prompt_tokens", "completion_tokens"), [(2, 5), (3, 4)])
def test_a_record_with_wrong_token_counts_fails_the_check(
    prompt_tokens: int, completion_tokens: int
) -> None:
    request = Request(Prompt(" a b c", (1, 2, 3)), max_tokens=5)
    record = Record(prompt_tokens=prompt_tokens, completion_tokens=completion_tokens)
    with pytest.raises(ContenderError, match="expected 5 tokens for a prompt of 3"):
        record.check(request)
    Record(prompt_tokens=3, completion_tokens=5).check(request)
