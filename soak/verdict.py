"""Checks of a soak and their bounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.stats import percentile
from soak.records import Ending, Sample
from soak.session import IDLE_SECONDS, KNOWN_COUNT, Run
from soak.stats import MIB, growth, own_slope, warm

MIN_OVERLOAD = 1.5
"""Least ratio of requests sent to accepted over the run. The target is 2; the ratio is lower while
the pace is still finding the capacity."""

STATUS_P99_SECONDS = 2.0
"""``Status`` never waits for the engine, but shares the CPU with the load."""

MAX_MORE = 8
"""Allowed growth of the median number of threads and of descriptors, from the first to the last
third of the warm samples. Connections open and close during the load."""

MAX_LEFT_OPEN = 4
"""Descriptors that may stay open after the load, since the process may have more threads then."""

MLX_CACHE_BYTES = 1 << 30
"""The server's highest limit for MLX's buffer cache, on any device."""

_RSS_MIB_PER_HOUR = 24.0
_RSS_NOISE_MIB = 16.0


def rss_bound(seconds: float) -> float:
    """Return the steepest memory growth that passes, in MiB per hour.

    The bound is 24 MiB per hour plus 16 MiB of heap noise within the checked time: over a short
    run, a small fluctuation is a large hourly rate.

    Args:
        seconds: Length of the checked time.
    """
    return _RSS_MIB_PER_HOUR + _RSS_NOISE_MIB * 3600 / seconds


@dataclass(frozen=True)
class Check:
    """Result of one check.

    Attributes:
        name: Name, with the unit of the figure.
        ok: Whether the check passes.
        figure: Measured value.
        bound: Required value.
    """

    name: str
    ok: bool
    figure: str
    bound: str


def judge(run: Run) -> list[Check]:
    """Return the result of every check."""
    return [*_streams(run), *_texts(run), *_flat(run), *_end(run)]


def _streams(run: Run) -> list[Check]:
    tally = run.tally
    stuck = tally.endings[Ending.STUCK]
    other = tally.problem_count - stuck - tally.differing
    ended = tally.endings.total()
    return [
        Check("streams ended", ended == tally.sent > 0, f"{ended:,}", f"all {tally.sent:,}"),
        Check("unexpected answers", other == 0, f"{other:,}", "0"),
        Check("stuck streams", stuck == 0, f"{stuck:,}", "0"),
        Check(
            "sent per accepted request",
            tally.overload >= MIN_OVERLOAD,
            f"{tally.overload:.2f}",
            f"at least {MIN_OVERLOAD}",
        ),
    ]


def _texts(run: Run) -> list[Check]:
    tally = run.tally
    figure = f"{tally.differing:,} of {tally.compared:,} finished and {tally.prefixes:,} partial"
    return [
        Check("text differs from reference", tally.compared > 0 == tally.differing, figure, "0"),
        Check(
            "reproduced after the load",
            run.still_same == KNOWN_COUNT,
            f"{run.still_same}",
            f"all {KNOWN_COUNT}",
        ),
    ]


def _flat(run: Run) -> list[Check]:
    """Check the samples after the warm-up for growth and for the latency of ``Status``."""
    samples = warm(run.samples, run.settings.seconds)
    if len(samples) < 3:
        return [Check("samples after the warm-up", ok=False, figure=f"{len(samples)}", bound="3")]
    p99 = percentile([sample.status_seconds for sample in samples], 99)
    return [
        *_memory(samples),
        flat("threads", [sample.threads for sample in samples]),
        flat("descriptors", [sample.descriptors for sample in samples]),
        Check(
            "Status p99, ms",
            p99 <= STATUS_P99_SECONDS,
            f"{p99 * 1000:.1f}",
            f"at most {STATUS_P99_SECONDS * 1000:.0f}",
        ),
    ]


def _memory(samples: list[Sample]) -> list[Check]:
    bound = rss_bound(samples[-1].seconds - samples[0].seconds)
    slope = own_slope(samples)
    cache = max(sample.cache_bytes for sample in samples)
    return [
        Check(
            "RSS minus buffer cache, MiB/h", slope <= bound, f"{slope:+.1f}", f"at most {bound:.0f}"
        ),
        Check(
            "buffer cache, MiB",
            cache <= MLX_CACHE_BYTES,
            f"{cache / MIB:.0f}",
            f"at most {MLX_CACHE_BYTES // MIB}",
        ),
    ]


def flat(name: str, values: Sequence[int]) -> Check:
    """Check that a number of threads or descriptors does not grow.

    Args:
        name: What is counted.
        values: The number in each sample after the warm-up, at least three.
    """
    more = growth(values)
    figure = f"{more:+g}, highest {max(values)}"
    return Check(f"growth of {name}", more <= MAX_MORE, figure, f"at most {MAX_MORE:+d}")


def _end(run: Run) -> list[Check]:
    idle = "never" if run.idle_seconds is None else f"{run.idle_seconds:.2f}"
    within = f"within {IDLE_SECONDS:.0f}"
    return [
        Check(
            "descriptors left open",
            run.left_open is not None and run.left_open <= MAX_LEFT_OPEN,
            f"{run.left_open}",
            f"at most {MAX_LEFT_OPEN}",
        ),
        Check("time until idle, s", run.idle_seconds is not None, idle, within),
        Check("health", run.is_serving, "serving" if run.is_serving else "not", "serving"),
        Check("exit code", run.exit_code == 0, f"{run.exit_code}", "0"),
        Check("tracebacks in the log", run.tracebacks == 0, f"{run.tracebacks}", "0"),
    ]
