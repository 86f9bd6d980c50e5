"""Checks of the soak, each with a failing run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from soak import __main__ as program
from soak import paths
from soak.records import Ending, Sample, Tally
from soak.report import table, write
from soak.session import KNOWN_COUNT, Run, Settings, count_tracebacks
from soak.verdict import judge, rss_bound

MIB = 2**20
SECONDS = 100.0


def _sample(second: int) -> Sample:
    return Sample(second, 800.0, 8, 32, 300 * MIB, MIB, MIB, MIB, 0.004, 30, 40)


def _run() -> Run:
    """Return a passing run."""
    tally = Tally(sent=40, tokens=999, compared=5, prefixes=2)
    tally.endings.update(
        {Ending.DONE: 12, Ending.CANCELLED: 6, Ending.REFUSED: 19, Ending.REJECTED: 3}
    )
    samples = [_sample(second) for second in range(1, int(SECONDS) + 1)]
    return Run(
        Settings(SECONDS),
        tally=tally,
        samples=samples,
        idle_seconds=0.1,
        still_same=KNOWN_COUNT,
        is_serving=True,
        exit_code=0,
        left_open=1,
    )


def _bad(run: Run) -> list[str]:
    return [check.name for check in judge(run) if not check.ok]


def test_a_good_run_holds() -> None:
    assert _bad(_run()) == []


def _lose_one(run: Run) -> None:
    run.tally.sent += 1


def _stick(run: Run) -> None:
    run.tally.endings[Ending.STUCK] += 1
    run.tally.sent += 1
    run.tally.note_problem("stuck")


def _raise(run: Run) -> None:
    run.tally.note_problem("INTERNAL GENERATION_FAILED")


def _differ(run: Run) -> None:
    run.tally.differing += 1
    run.tally.note_problem("differs")


def _compare_nothing(run: Run) -> None:
    run.tally.compared = 0


def _differ_at_the_end(run: Run) -> None:
    run.still_same -= 1


def _keep_up(run: Run) -> None:
    run.tally.endings[Ending.DONE] += run.tally.endings.pop(Ending.REFUSED)


def _grow(run: Run) -> None:
    each = 2 * rss_bound(0.75 * SECONDS) * MIB / 3600
    run.samples = [
        replace(sample, rss_bytes=sample.rss_bytes + int(each * sample.seconds))
        for sample in run.samples
    ]


def _fill_the_cache(run: Run) -> None:
    run.samples = [replace(each, cache_bytes=2**30 + 1) for each in run.samples]


def _leave_open(run: Run) -> None:
    run.left_open = 5


def _leak_threads(run: Run) -> None:
    run.samples = [replace(each, threads=int(each.seconds)) for each in run.samples]


def _leak_descriptors(run: Run) -> None:
    run.samples = [replace(each, descriptors=int(each.seconds)) for each in run.samples]


def _answer_late(run: Run) -> None:
    run.samples = [replace(each, status_seconds=2.5) for each in run.samples]


def _sample_nothing(run: Run) -> None:
    run.samples = []


def _stay_busy(run: Run) -> None:
    run.idle_seconds = None


def _be_unhealthy(run: Run) -> None:
    run.is_serving = False


def _be_killed(run: Run) -> None:
    run.exit_code = None


def _log_a_traceback(run: Run) -> None:
    run.tracebacks = 1


@pytest.mark.parametrize(
    ("spoil", "names"),
    [
        (_lose_one, ["streams ended"]),
        (_stick, ["stuck streams"]),
        (_raise, ["unexpected answers"]),
        (_differ, ["text differs from reference"]),
        (_compare_nothing, ["text differs from reference"]),
        (_differ_at_the_end, ["reproduced after the load"]),
        (_keep_up, ["sent per accepted request"]),
        (_grow, ["RSS minus buffer cache, MiB/h"]),
        (_fill_the_cache, ["buffer cache, MiB"]),
        (_leave_open, ["descriptors left open"]),
        (_leak_threads, ["growth of threads"]),
        (_leak_descriptors, ["growth of descriptors"]),
        (_answer_late, ["Status p99, ms"]),
        (_sample_nothing, ["samples after the warm-up"]),
        (_stay_busy, ["time until idle, s"]),
        (_be_unhealthy, ["health"]),
        (_be_killed, ["exit code"]),
        (_log_a_traceback, ["tracebacks in the log"]),
    ],
)
def test_every_fault_fails_the_matching_check(
    spoil: Callable[[Run], None], names: list[str]
) -> None:
    run = _run()
    spoil(run)
    assert _bad(run) == names


def test_growth_during_the_warm_up_is_ignored() -> None:
    run = _run()
    run.samples = [
        replace(sample, rss_bytes=MIB) if sample.seconds < 0.25 * SECONDS else sample
        for sample in run.samples
    ]
    assert _bad(run) == []


def test_the_buffer_cache_may_grow_up_to_its_limit() -> None:
    run = _run()
    run.samples = [
        replace(each, cache_bytes=int(each.seconds) * MIB, rss_bytes=int(each.seconds) * MIB)
        for each in run.samples
    ]
    assert _bad(run) == []


def test_a_longer_run_has_a_stricter_bound() -> None:
    assert rss_bound(90) == pytest.approx(664)
    assert rss_bound(22.5 * 60) == pytest.approx(67, abs=1)
    assert rss_bound(1e9) == pytest.approx(24, abs=0.1)


def test_the_overload_excludes_invalid_requests() -> None:
    assert _run().tally.overload == pytest.approx(37 / 18)
    assert Tally().overload == 0


def test_problems_are_counted_beyond_the_number_kept() -> None:
    tally = Tally()
    for _ in range(1000):
        tally.note_problem("again")
    assert tally.problem_count == 1000
    assert len(tally.problems) == 50


def test_the_figures_can_be_read_again(tmp_path: Path) -> None:
    run = _run()
    write(run, judge(run), tmp_path / "new" / "soak.json")
    whole = json.loads((tmp_path / "new" / "soak.json").read_text(encoding="utf-8"))
    assert whole["passed"] is True
    assert whole["figures"]["endings"]["queue full"] == 19
    assert whole["figures"]["rss_slope_mib_per_hour"] == 0
    assert len(whole["samples"]) == SECONDS
    assert len(whole["samples"][0]) == len(whole["sample_columns"])


def test_the_table_ends_with_the_verdict() -> None:
    run = _run()
    assert table(run, judge(run)).endswith("the soak passed")
    _raise(run)
    shown = table(run, judge(run))
    assert "FAIL unexpected answers" in shown
    assert "INTERNAL GENERATION_FAILED" in shown
    assert shown.endswith("the soak failed: 1 of 16 checks")


def test_only_a_full_run_writes_the_committed_results() -> None:
    assert program.parse_args([]).out == paths.RESULTS
    assert program.parse_args(["--minutes", "29"]).out == paths.SCRATCH
    assert program.parse_args(["--minutes", "2", "--out", "x"]).out == Path("x")
    for minutes in ("0.5", "100000"):
        with pytest.raises(SystemExit):
            program.parse_args(["--minutes", minutes])


def test_tracebacks_are_found_in_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("all is well\nTraceback (most recent call last):\n  File\nKeyError\n")
    assert count_tracebacks(log) == 1
