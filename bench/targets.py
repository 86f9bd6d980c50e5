"""Performance targets, evaluated on the figures of one run."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from bench.contenders import OURS, PEERS
from bench.measures import arrival, prefix, quantized, start
from bench.models import DEMO
from bench.results import Case, Results
from bench.stats import percentile

_SMALL = ("llama-1m", DEMO)
_LARGE_VOCABULARY = "qwen3-20m"
_STATUS_P99_SECONDS = 0.010

Figure = Callable[[Results], float | None]


@dataclass(frozen=True)
class Target:
    """A performance target.

    Attributes:
        what: Description.
        limit: Bound of the figure.
        at_most: Whether ``limit`` is an upper bound rather than a lower one.
        figure: Computes the figure, or returns None if its inputs were not measured.
        unit: Unit of figure and bound; empty for a ratio.
    """

    what: str
    limit: float
    figure: Figure
    at_most: bool = False
    unit: str = ""


@dataclass(frozen=True)
class Verdict:
    """Outcome of a target; ``figure`` and ``met`` are None if not measured."""

    target: Target
    figure: float | None
    met: bool | None


def evaluate(results: Results) -> list[Verdict]:
    """Evaluate every target."""
    return [_judge(target, target.figure(results)) for target in TARGETS]


def _judge(target: Target, figure: float | None) -> Verdict:
    if figure is None:
        return Verdict(target, None, None)
    met = figure <= target.limit if target.at_most else figure >= target.limit
    return Verdict(target, figure, met)


def _median(
    results: Results, measure: str, model: str, contender: str, metric: str, case: Case
) -> float | None:
    values = results.values(measure, model, contender, metric, case)
    return statistics.median(values) if values else None


def _ratio(over: float | None, under: float | None) -> float | None:
    return over / under if over is not None and under else None


def _against(other: str, measure: str, model: str, metric: str, case: Case) -> Figure:
    """Return the ratio of ours to another contender."""
    return lambda results: _ratio(
        _median(results, measure, model, OURS, metric, case),
        _median(results, measure, model, other, metric, case),
    )


def _against_best(measure: str, model: str, metric: str, case: Case, *, lowest: bool) -> Figure:
    """Return the ratio of ours to the best peer."""

    def figure(results: Results) -> float | None:
        ours = _median(results, measure, model, OURS, metric, case)
        peers = [_median(results, measure, model, peer, metric, case) for peer in PEERS]
        measured = [value for value in peers if value is not None]
        best = (min if lowest else max)(measured, default=None)
        return _ratio(ours, best)

    return figure


def _sampled_over_greedy(model: str) -> Figure:
    return lambda results: _ratio(
        _median(results, "sampled", model, OURS, "rate", 16),
        _median(results, "greedy", model, OURS, "rate", 16),
    )


def _status_p99(results: Results) -> float | None:
    values = results.values("health", arrival.MODEL, OURS, "latency_seconds", "Status")
    return percentile(values, 99) if values else None


def _of_throughput(model: str) -> list[Target]:
    """Return the targets of a model with a small vocabulary."""
    direct = {1: 0.95, 8: 1.0, 16: 1.0}
    targets = [
        Target(
            f"{model}: greedy over gRPC / direct, {streams} stream{'s' * (streams > 1)}",
            limit,
            _against("direct", "greedy", model, "rate", streams),
        )
        for streams, limit in direct.items()
    ]
    return [
        *targets,
        Target(
            f"{model}: greedy / best peer, 16 streams",
            1.3,
            _against_best("greedy", model, "rate", 16, lowest=False),
        ),
        Target(
            f"{model}: sampled / best peer, 16 streams",
            2.0,
            _against_best("sampled", model, "rate", 16, lowest=False),
        ),
        Target(f"{model}: sampled / greedy, 16 streams", 0.85, _sampled_over_greedy(model)),
    ]


TARGETS = [
    *(target for model in _SMALL for target in _of_throughput(model)),
    Target(
        f"{_LARGE_VOCABULARY}: sampled / best peer, 16 streams",
        3.0,
        _against_best("sampled", _LARGE_VOCABULARY, "rate", 16, lowest=False),
    ),
    Target(
        f"{_LARGE_VOCABULARY}: sampled / greedy, 16 streams",
        0.75,
        _sampled_over_greedy(_LARGE_VOCABULARY),
    ),
    Target(
        "first token with a shared prefix / best peer",
        1.0,
        _against_best("prefix", prefix.MODEL, "ttft_seconds", "shared", lowest=True),
        at_most=True,
    ),
    Target(
        f"longest gap, {arrival.LONG_TOKENS:,}-token prompt arriving / best peer",
        1 / 20,
        _against_best("arrival", arrival.MODEL, "gap_seconds", arrival.LONG_TOKENS, lowest=True),
        at_most=True,
    ),
    Target(
        "first token of that prompt / best peer",
        1.3,
        _against_best("arrival", arrival.MODEL, "ttft_seconds", arrival.LONG_TOKENS, lowest=True),
        at_most=True,
    ),
    Target(
        "Status p99 during that prefill",
        _STATUS_P99_SECONDS,
        _status_p99,
        at_most=True,
        unit="s",
    ),
    Target(
        "4-bit on CPU, decode / mlx-lm server as installed",
        8.0,
        _against(PEERS[0], "quantized", quantized.MODEL, "decode_rate", 1),
    ),
    Target(
        "4-bit on CPU, prefill / mlx-lm server as installed",
        40.0,
        _against(PEERS[0], "quantized", quantized.MODEL, "prompt_rate", 1),
    ),
    Target(
        "start to first token / best peer",
        0.7,
        _against_best("start", start.MODEL, "start_seconds", 1, lowest=True),
        at_most=True,
    ),
]
