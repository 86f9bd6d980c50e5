"""Performance targets, evaluated on the figures of one run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.contenders import OURS, PEERS
from bench.measures import arrival, limits, prefix, quantized, start
from bench.models import DEMO
from bench.results import Case, Results
from bench.stats import percentile, summarize

_SMALL = ("llama-1m", DEMO)
_LARGE_VOCABULARY = "qwen3-20m"
_LARGE = "llama-100m"
_STATUS_P99_SECONDS = 0.010


@dataclass(frozen=True)
class Reading:
    """A figure, and what the extremes of the rounds would make of it.

    Attributes:
        value: The figure, from the medians.
        low: Lowest figure from the extremes.
        high: Highest figure from the extremes.
    """

    value: float
    low: float
    high: float


Figure = Callable[[Results], Reading | None]


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
    """Outcome of a target; ``reading``, ``figure`` and ``met`` are None if not measured."""

    target: Target
    reading: Reading | None

    @property
    def figure(self) -> float | None:
        """The figure compared with the bound."""
        return self.reading.value if self.reading else None

    @property
    def met(self) -> bool | None:
        """Whether the figure keeps the bound."""
        return None if self.figure is None else self._keeps(self.figure)

    @property
    def is_within_spread(self) -> bool:
        """Whether the bound lies between the figures from the extremes of the rounds."""
        return bool(self.reading and self.reading.low <= self.target.limit <= self.reading.high)

    def _keeps(self, figure: float) -> bool:
        limit = self.target.limit
        return figure <= limit if self.target.at_most else figure >= limit


def evaluate(results: Results) -> list[Verdict]:
    """Evaluate every target."""
    return [Verdict(target, target.figure(results)) for target in TARGETS]


def ratio(over: Sequence[float], under: Sequence[float]) -> Reading | None:
    """Return the ratio of two series, or None if one of them was not measured."""
    if not over or not under:
        return None
    top, bottom = summarize(over), summarize(under)
    if not bottom.low:
        return None
    return Reading(top.median / bottom.median, top.low / bottom.high, top.high / bottom.low)


def best_peer(
    results: Results, measure: str, model: str, metric: str, case: Case, *, lowest: bool
) -> list[float]:
    """Return the series of the peer with the best median, empty if none was measured."""
    found = [results.values(measure, model, peer, metric, case) for peer in PEERS]
    measured = [values for values in found if values]
    return (min if lowest else max)(measured, key=statistics.median, default=[])


def _against(other: str, measure: str, model: str, metric: str, case: Case) -> Figure:
    """Return the ratio of ours to another contender."""
    return lambda results: ratio(
        results.values(measure, model, OURS, metric, case),
        results.values(measure, model, other, metric, case),
    )


def _against_best(measure: str, model: str, metric: str, case: Case, *, lowest: bool) -> Figure:
    """Return the ratio of ours to the best peer."""
    return lambda results: ratio(
        results.values(measure, model, OURS, metric, case),
        best_peer(results, measure, model, metric, case, lowest=lowest),
    )


def _sampled_over_greedy(model: str) -> Figure:
    return lambda results: ratio(
        results.values("sampled", model, OURS, "rate", 16),
        results.values("greedy", model, OURS, "rate", 16),
    )


def _status_p99(results: Results) -> Reading | None:
    values = results.values("health", arrival.MODEL, OURS, "latency_seconds", "Status")
    if not values:
        return None
    slowest = percentile(values, 99)
    return Reading(slowest, slowest, slowest)


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


def _share(model: str, metric: str, case: Case) -> Figure:
    """Return the share of the machine's limit reached by ours."""
    return _against(limits.MACHINE, limits.MEASURE, model, metric, case)


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
    Target(f"{_LARGE}: decode / bandwidth limit, 1 stream", 0.8, _share(_LARGE, "decode_rate", 1)),
    Target(
        f"{_LARGE}: prefill / limit of matrix products",
        0.85,
        _share(_LARGE, "prompt_rate", limits.PROMPT_TOKENS),
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
