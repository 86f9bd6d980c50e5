"""Checks of a pool soak and their bounds."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from soak.pool.records import Phase, PoolRun, PoolSample
from soak.records import Ending
from soak.stats import MIB, warm
from soak.verdict import MAX_LEFT_OPEN, Check, flat

MAX_GAP_SECONDS = 5.0
"""Longest time between two samples. They are taken four times a second, on a loaded machine."""

ZOMBIE_SECONDS = 5.0
"""Time within which an exited runner is reaped. At a load of 14 on 2 cores it took up to 1.3 s."""

LOADS_PER_MINUTE = 4.0
"""Least number of loads: a run whose models stay in memory shows nothing."""


def judge(run: PoolRun) -> list[Check]:
    """Return the result of every check."""
    if not run.phases:
        return [Check("phases", ok=False, figure="0", bound="at least 1")]
    checks = [check for phase in run.phases for check in judge_phase(phase)]
    return [*checks, *judge_whole(run)]


def judge_whole(run: PoolRun) -> list[Check]:
    """Return the result of the checks that concern all phases."""
    models = {model for phase in run.phases for model in phase.needs}
    loaded = {model for phase in run.phases for model in phase.loads}
    return [
        Check("models loaded", loaded >= models, f"{len(loaded)}", f"all {len(models)}"),
        _none("tracebacks in the log", run.tracebacks),
    ]


def judge_phase(phase: Phase) -> list[Check]:
    """Return the result of every check of a phase."""
    return [*_requests(phase), *_samples(phase), *_rest(phase)]


def _requests(phase: Phase) -> list[Check]:
    tally = phase.tally
    ended, differing = tally.endings.total(), tally.differing
    refused, stuck = tally.endings[Ending.WRONGLY_REFUSED], tally.endings[Ending.STUCK]
    least = LOADS_PER_MINUTE * phase.seconds / 60
    loads = phase.loads.total()
    # A pool is rightly refused for as long as others of the machine have the memory.
    serving = min(2, len(phase.schedulers))
    served = ", ".join(f"{count:,} by {name}" for name, count in sorted(phase.served.items()))
    answers = f"{differing:,} of {tally.compared:,} finished and {tally.prefixes:,} partial"
    return [
        Check("requests ended", ended == tally.sent > 0, f"{ended:,}", f"all {tally.sent:,}"),
        Check("wrong refusals", refused == 0, f"{refused:,}", "0"),
        _none("errors outside the table", tally.endings[Ending.FAILED]),
        Check("stuck requests", stuck == 0, f"{stuck:,}", "0"),
        Check("wrong answers", tally.compared > 0 == differing, answers, "0"),
        Check(
            "schedulers that served",
            len(phase.schedulers & set(phase.served)) >= serving,
            served or "nothing",
            f"at least {serving} of {len(phase.schedulers)}",
        ),
        Check("loads", loads >= least, f"{loads:,}", f"at least {least:.0f}"),
    ]


def _none(name: str, count: int) -> Check:
    return Check(name, count == 0, f"{count:,}", "0")


def _samples(phase: Phase) -> list[Check]:
    gap = _longest_gap(phase)
    taken = Check(
        "longest time without a sample, s",
        gap <= MAX_GAP_SECONDS,
        f"{gap:.2f}, {len(phase.samples):,} samples",
        f"at most {MAX_GAP_SECONDS:g}",
    )
    samples = warm(phase.samples, phase.seconds)
    if len(samples) < 3:
        return [taken]
    return [
        taken,
        _memory("memory of the runners, MiB", phase, [each.held_bytes for each in phase.samples]),
        _memory("needs of the runners, MiB", phase, list(map(phase.promised_bytes, phase.samples))),
        flat("threads", [each.threads for each in samples]),
        flat("descriptors", [each.descriptors for each in samples]),
        _zombies(phase.samples),
    ]


def _longest_gap(phase: Phase) -> float:
    times = [0.0, *(sample.seconds for sample in phase.samples), phase.seconds]
    return max(after - before for before, after in itertools.pairwise(times))


def _memory(name: str, phase: Phase, sizes: Sequence[int]) -> Check:
    over = sum(size > phase.limit_bytes for size in sizes)
    figure = f"highest {max(sizes) / MIB:.0f}, {over:,} samples above"
    return Check(name, over == 0, figure, f"at most {phase.limit_bytes / MIB:.0f}")


def _zombies(samples: Sequence[PoolSample]) -> Check:
    longest = max(_zombie_seconds(samples), default=0.0)
    return Check(
        "longest life of a zombie, s",
        longest <= ZOMBIE_SECONDS,
        f"{longest:.2f}",
        f"at most {ZOMBIE_SECONDS:g}",
    )


def _zombie_seconds(samples: Sequence[PoolSample]) -> list[float]:
    """Return the time between the first and the last sample of each zombie."""
    seen: dict[int, list[float]] = {}
    for sample in samples:
        for pid in sample.zombies:
            seen.setdefault(pid, []).append(sample.seconds)
    return [times[-1] - times[0] for times in seen.values()]


def _rest(phase: Phase) -> list[Check]:
    rest = phase.rest
    if rest is None:
        return [Check("end of the phase", ok=False, figure="not reached", bound="reached")]
    return [
        _none("runners left", rest.runners),
        _none("zombies left", rest.zombies),
        Check(
            "descriptors left open",
            rest.descriptors <= MAX_LEFT_OPEN,
            f"{rest.descriptors}",
            f"at most {MAX_LEFT_OPEN}",
        ),
    ]
