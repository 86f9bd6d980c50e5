"""Performance targets, evaluated on the figures of one run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.contenders import OURS, PEERS
from bench.contenders.ours import Drafting, OverHttp
from bench.measures import arrival, drafts, http, limits, prefix, quantized, start
from bench.measures.throughput import PLANS, Plan
from bench.models import DEMO
from bench.results import Case, Results
from bench.stats import percentile, summarize

_SMALL = ("llama-1m", DEMO)
_LARGE_VOCABULARY = "qwen3-20m"
_LARGE = "llama-100m"
_SLIDING = "gemma3-7m"
_COMPARED = (1, 8, 16, 32)
"""Numbers of streams at which ours is compared with mlx_lm called in process."""

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


def _between(over: str, under: str, model: str) -> Figure:
    """Return the ratio of two measures of ours at 16 streams."""
    return lambda results: ratio(
        results.values(over, model, OURS, "rate", 16),
        results.values(under, model, OURS, "rate", 16),
    )


def _status_p99(results: Results) -> Reading | None:
    values = results.values("health", arrival.MODEL, OURS, "latency_seconds", "Status")
    if not values:
        return None
    slowest = percentile(values, 99)
    return Reading(slowest, slowest, slowest)


def _over_direct(plan: Plan) -> list[Target]:
    """Return the targets against mlx_lm called in process, which has no server to pay for."""
    return [
        Target(
            f"{plan.model}: greedy over gRPC / direct, {_streams(streams)}",
            1.0,
            _against("direct", "greedy", plan.model, "rate", streams),
        )
        for streams in plan.greedy
        if streams in _COMPARED
    ]


def _over_best_peer(measure: str, model: str, streams: int, limit: float) -> Target:
    return Target(
        f"{model}: {measure} / best peer, {_streams(streams)}",
        limit,
        _against_best(measure, model, "rate", streams, lowest=False),
    )


def _of_drafts(case: str) -> list[Target]:
    """Return the targets of a case with drafts against the same case without.

    Greedy texts of random weights repeat, as copies do; drafts of other texts must cost nothing.
    """
    return [
        Target(
            f"{model}: with / without drafts, {case}",
            2.0 if case == "greedy, 1 stream" and model != DEMO else 0.98,
            _drafted_over_plain(model, case),
        )
        for model, numbers in drafts.STREAMS.items()
        if any(case.endswith(f", {_streams(number)}") for number in numbers)
    ]


def _drafted_over_plain(model: str, case: str) -> Figure:
    return lambda results: ratio(
        results.values(drafts.MEASURE, model, Drafting.name, "rate", case),
        results.values(drafts.MEASURE, model, OURS, "rate", case),
    )


def _http_over_grpc(model: str) -> Figure:
    return lambda results: ratio(
        results.values(http.MEASURE, model, OverHttp.name, "rate", 16),
        results.values(http.MEASURE, model, OURS, "rate", 16),
    )


def _streams(count: int) -> str:
    return f"{count} stream{'s' * (count > 1)}"


def _share(model: str, metric: str, case: Case) -> Figure:
    """Return the share of the machine's limit reached by ours."""
    return _against(limits.MACHINE, limits.MEASURE, model, metric, case)


TARGETS = [
    *(target for plan in PLANS.values() for target in _over_direct(plan)),
    *(_over_best_peer("greedy", model, 1, 1.15) for model in _SMALL),
    _over_best_peer("greedy", "llama-1m", 16, 1.3),
    _over_best_peer("sampled", "llama-1m", 16, 2.0),
    _over_best_peer("greedy", DEMO, 16, 1.5),
    _over_best_peer("sampled", DEMO, 16, 2.2),
    *(_over_best_peer("greedy", _SLIDING, streams, 1.3) for streams in (8, 16)),
    _over_best_peer("greedy", _LARGE, 16, 1.2),
    _over_best_peer("sampled", _LARGE_VOCABULARY, 16, 3.0),
    *(
        Target(f"{model}: sampled / greedy, 16 streams", 0.95, _between("sampled", "greedy", model))
        for model in _SMALL
    ),
    Target(
        f"{_LARGE_VOCABULARY}: greedy / sampled, 16 streams",
        1.0,
        _between("greedy", "sampled", _LARGE_VOCABULARY),
    ),
    *_of_drafts("greedy, 1 stream"),
    *_of_drafts("sampled, 1 stream"),
    *_of_drafts("greedy, 8 streams"),
    *_of_drafts("sampled, 8 streams"),
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
        1 / 50,
        _against_best("arrival", arrival.MODEL, "gap_seconds", arrival.LONG_TOKENS, lowest=True),
        at_most=True,
    ),
    Target(
        "first token of that prompt / best peer",
        1.0,
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
    *(
        Target(
            f"{model}: over HTTP / over gRPC, 16 streams",
            0.9,
            _http_over_grpc(model),
        )
        for model in http.MODELS
    ),
    Target(
        "start to first token / best peer",
        0.7,
        _against_best("start", start.MODEL, "start_seconds", 1, lowest=True),
        at_most=True,
    ),
]
