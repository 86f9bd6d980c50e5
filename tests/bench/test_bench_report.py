"""Results on disk, tables, targets and the report."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("tokenizers", reason="no tokenizers (the server extra)")

from bench import tables
from bench.report import render
from bench.results import Case, Key, Results
from bench.stats import summarize
from bench.targets import evaluate
from support.bench_results import ABOUT


def _results(*series: tuple[str, str, str, str, Case, list[float]]) -> Results:
    results = Results(about=ABOUT)
    for measure, model, contender, metric, case, values in series:
        results.series[Key(measure, model, contender, metric, case)] = values
    return results


def _greedy(**rates: float) -> Results:
    names = {"ours": "ours", "direct": "direct", "server": "mlx-lm server", "smg": "SMG"}
    rows = [("greedy", "demo", names[name], "rate", 16, [rate]) for name, rate in rates.items()]
    return _results(*rows)


def _judged(results: Results, words: str) -> tuple[float, bool | None]:
    """Return the figure of a target, or zero if unmeasured, and whether the target is met."""
    (verdict,) = [verdict for verdict in evaluate(results) if words in verdict.target.what]
    return round(verdict.figure or 0.0, 6), verdict.met


def test_figures_survive_the_disk(tmp_path: Path) -> None:
    results = _results(("greedy", "demo", "ours", "rate", 16, [1.5, 2.0]))
    results.add(Key("health", "demo", "SMG", "latency_seconds", "health"), 0.0012345678)
    results.fail("SMG", "start", "it broke")
    results.timelines["ours"] = [-0.1, 0.2]
    results.write(tmp_path / "results.json")
    again = Results.read(tmp_path / "results.json")
    assert again.about == results.about
    assert again.failures == [{"contender": "SMG", "measure": "start", "why": "it broke"}]
    assert again.timelines == results.timelines
    assert again.values("greedy", "demo", "ours", "rate", 16) == [1.5, 2.0]
    assert again.values("health", "demo", "SMG", "latency_seconds", "health") == [0.00123457]


@pytest.mark.parametrize(
    ("metric", "values", "words"),
    [
        ("rate", [1234.4, 1000, 2000.6], "1,234 (1,000 to 2,001)"),
        ("ttft_seconds", [0.0123, 0.010, 2.5], "12.3 ms (10 ms to 2.5 s)"),
        ("rss_bytes", [3 * 2**20], "3 MiB"),
    ],
)
def test_a_cell_is_median_and_spread_with_its_unit(
    metric: str, values: list[float], words: str
) -> None:
    assert tables.spread(summarize(values), metric) == words


def test_a_table_has_a_row_for_each_contender_and_a_dash_for_missing_values() -> None:
    results = _results(
        ("greedy", "demo", "ours", "rate", 1, [100.0]),
        ("greedy", "demo", "ours", "rate", 8, [300.0]),
        ("greedy", "demo", "SMG", "rate", 1, [90.0]),
    )
    assert tables.by_case(results, "greedy", "demo", "rate").splitlines() == [
        "|  | 1 | 8 |",
        "| --- | ---: | ---: |",
        "| ours | 100 | 300 |",
        "| SMG | 90 | - |",
    ]


def test_a_target_compares_with_the_best_peer() -> None:
    results = _greedy(ours=150.0, direct=100.0, server=80.0, smg=100.0)
    assert _judged(results, "demo: greedy / best peer, 16") == (1.5, True)
    assert _judged(results, "demo: greedy over gRPC / direct, 16") == (1.5, True)


def test_a_missed_target_has_a_figure() -> None:
    results = _greedy(ours=120.0, server=100.0)
    assert _judged(results, "demo: greedy / best peer, 16") == (1.2, False)


@pytest.mark.parametrize(
    ("ours", "sentence"),
    [
        ([1.2], "**Missed** by 20 %, outside the spread of the rounds (1.2 to 1.2)."),
        ([1.1, 1.2, 1.6], "**Missed** by 20 %, within the spread of the rounds (1.1 to 1.6)."),
    ],
)
def test_a_missed_target_has_a_sentence(ours: list[float], sentence: str) -> None:
    results = _results(
        ("greedy", "demo", "ours", "rate", 16, ours),
        ("greedy", "demo", "SMG", "rate", 16, [1.0]),
    )
    assert f"| demo: greedy / best peer, 16 streams | at least 1.5 | 1.2 | {sentence} |" in (
        tables.verdicts(evaluate(results))
    )


def test_the_report_begins_with_a_summary_and_the_models() -> None:
    report = render(_greedy(ours=130.0, direct=100.0, server=80.0, smg=65.0), [], ".", 3)
    assert "2 of 2 targets were met" in report
    assert "| demo | greedy | 130 | 1.30 | 1.62 |" in report
    assert "| qwen3-20m | qwen3 | 2 x 128 | 151,936 | float32 | random |" in report
    heads = [line for line in report.splitlines() if line.startswith("## ")]
    assert heads[:4] == ["## Summary", "## Models", "## Machine", "## Targets"]


def test_an_unmeasured_target_is_neither_met_nor_missed() -> None:
    assert _judged(_greedy(ours=120.0), "demo: greedy / best peer, 16") == (0.0, None)
    assert all(verdict.met is None for verdict in evaluate(_results()))


def test_the_best_peer_time_is_the_shortest() -> None:
    results = _results(
        ("start", "llama-1m", "ours", "start_seconds", 1, [0.6, 0.7, 0.8]),
        ("start", "llama-1m", "mlx-lm server", "start_seconds", 1, [1.0]),
        ("start", "llama-1m", "SMG", "start_seconds", 1, [2.0]),
    )
    assert _judged(results, "start to first token") == (0.7, True)


def test_status_is_judged_by_its_slowest_hundredth() -> None:
    calls = [0.001] * 98 + [0.02] * 2
    results = _results(("health", "llama-1m", "ours", "latency_seconds", "Status", calls))
    assert _judged(results, "Status p99") == (0.02, False)


def test_the_report_names_machine_figures_and_failures() -> None:
    results = _greedy(ours=1300.0, direct=1000.0)
    results.fail("SMG", "start", "the environment is missing")
    report = render(results, ["throughput-demo.svg"], "../bench/results", 3)
    for words in (
        "A CPU, 2 cores, 8 GiB, An OS, Python 3.11.0",
        "FastBLAS (libfast.so), 200 GFLOP/s",
        "Nothing here was measured on Metal or CUDA",
        "| ours | 1,300 |",
        "(../bench/results/throughput-demo.svg)",
        "- SMG, start: the environment is missing",
    ):
        assert words in report
    assert "## Memory" not in report


def test_drafts_are_judged_beside_the_same_runner_without_them() -> None:
    results = _results(
        ("drafts", "demo", "ours", "rate", "sampled, 1 stream", [100.0]),
        ("drafts", "demo", "ours with drafts", "rate", "sampled, 1 stream", [97.0]),
    )
    assert _judged(results, "demo: with / without drafts, sampled, 1 stream") == (0.97, False)


def test_requests_at_random_have_a_row_for_each_rate_of_arrival() -> None:
    rates: dict[Case, list[float]] = {50: [19.0, 20.0, 21.0], 80: [32.0], "equal": [15.0]}
    measured: list[tuple[str, str, str, str, Case, list[float]]] = [
        *(("open-loop", "llama-1m", "ours", "arrival_rate", *each) for each in rates.items()),
        *(
            ("open-loop", "llama-1m", "ours", metric, case, [0.001 * n for n in range(1, 101)])
            for metric in ("ttft_seconds", "token_seconds")
            for case in rates
        ),
    ]
    text = render(_results(*measured), [], ".", 3)
    percentiles = "50 ms | 95 ms | 99 ms"
    assert f"| ours, 50 % | 20 | {percentiles} | {percentiles} |" in text
    assert "| ours, 80 % | 32 |" in text
    assert "| ours, equal rate | 15 |" in text
