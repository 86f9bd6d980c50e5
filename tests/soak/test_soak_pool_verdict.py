"""Checks of the pool soak, each with a failing run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("tokenizers", reason="no tokenizers (the server extra)")

from bench.page import replace_part
from soak import __main__ as program
from soak import paths, soaks
from soak.pool import report
from soak.pool.records import UNKNOWN, Phase, PoolRun, PoolSample, Rest
from soak.pool.verdict import judge
from soak.records import Ending
from soak.session import Settings

MIB = 2**20
SECONDS = 100.0
NEEDS = {"small": 100 * MIB, "large": 150 * MIB}


def _sample(second: int) -> PoolSample:
    runners = (("small", 80 * MIB), ("large", 120 * MIB))
    return PoolSample(second, runners, 150 * MIB, descriptors=30, threads=20, rss_bytes=MIB)


def _phase(name: str = "one pool") -> Phase:
    """Return a passing phase."""
    phase = Phase(name, SECONDS, 250 * MIB, NEEDS, frozenset({"pool 1", "pool 2"}))
    tally = phase.tally
    tally.sent, tally.tokens, tally.compared, tally.prefixes = 30, 999, 20, 4
    tally.endings.update(
        {Ending.DONE: 20, Ending.CANCELLED: 6, Ending.DECLINED: 3, Ending.EXPIRED: 1}
    )
    tally.first_seconds.extend([0.1, 0.5])
    phase.served.update({"pool 1": 12, "pool 2": 8})
    phase.loads.update({"small": 5, "large": 4})
    phase.samples = [_sample(second) for second in range(1, int(SECONDS) + 1)]
    phase.rest = Rest(runners=0, zombies=0, descriptors=1)
    return phase


def _run(*phases: Phase) -> PoolRun:
    about = {
        "time": "2026-01-02T03:04+00:00",
        "cores": 2,
        "system": "An OS",
        "python": "3.11.0",
        "packages": {"mlx": "0.32"},
        "load_average": [0.5, 0.5, 0.5],
    }
    return PoolRun(Settings(2 * SECONDS), about, list(phases))


def _bad(*phases: Phase) -> list[str]:
    return [check.name for check in judge(_run(*phases)) if not check.ok]


def test_a_good_run_holds() -> None:
    assert _bad(_phase(), _phase("shared")) == []


def test_a_bad_phase_fails_the_run_wherever_it_is() -> None:
    bad = _phase("shared")
    bad.tally.differing = 1
    assert _bad(_phase(), bad) == ["wrong answers"]


def test_a_run_without_phases_fails() -> None:
    assert _bad() == ["phases"]


def _change_samples(phase: Phase, change: Callable[[PoolSample], PoolSample]) -> None:
    phase.samples = [change(sample) for sample in phase.samples]


def _lose_one(phase: Phase) -> None:
    phase.tally.sent += 1


def _end(ending: Ending) -> Callable[[Phase], None]:
    def spoil(phase: Phase) -> None:
        phase.tally.endings[ending] += 1
        phase.tally.sent += 1

    return spoil


def _differ(phase: Phase) -> None:
    phase.tally.differing += 1


def _compare_nothing(phase: Phase) -> None:
    phase.tally.compared = 0


def _starve_all_but_one(phase: Phase) -> None:
    phase.served.clear()
    phase.served["pool 1"] = 5


def _never_load_one(phase: Phase) -> None:
    phase.loads["small"] += phase.loads.pop("large")


def _hardly_load(phase: Phase) -> None:
    phase.loads.update({"small": -4, "large": -3})


def _hold_too_much_once(phase: Phase) -> None:
    phase.samples[50] = replace(phase.samples[50], runners=(("large", 251 * MIB),))


def _promise_too_much_once(phase: Phase) -> None:
    """Let a third runner start while two are alive, with hardly any memory yet."""
    sample = phase.samples[50]
    phase.samples[50] = replace(sample, runners=(*sample.runners, (UNKNOWN, MIB)))


def _pause_sampling(phase: Phase) -> None:
    del phase.samples[40:50]


def _end_sampling_early(phase: Phase) -> None:
    del phase.samples[-10:]


def _leak_threads(phase: Phase) -> None:
    _change_samples(phase, lambda each: replace(each, threads=int(each.seconds)))


def _leak_descriptors(phase: Phase) -> None:
    _change_samples(phase, lambda each: replace(each, descriptors=int(each.seconds)))


def _leave_a_zombie_for_a_while(phase: Phase) -> None:
    for index in range(10, 17):
        phase.samples[index] = replace(phase.samples[index], zombies=(7,))


def _leave_a_runner(phase: Phase) -> None:
    phase.rest = Rest(runners=1, zombies=0, descriptors=0)


def _leave_a_zombie(phase: Phase) -> None:
    phase.rest = Rest(runners=0, zombies=1, descriptors=0)


def _leave_descriptors(phase: Phase) -> None:
    phase.rest = Rest(runners=0, zombies=0, descriptors=5)


def _stop_early(phase: Phase) -> None:
    phase.rest = None


@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        (_lose_one, "requests ended"),
        (_end(Ending.WRONGLY_REFUSED), "wrong refusals"),
        (_end(Ending.FAILED), "errors outside the table"),
        (_end(Ending.STUCK), "stuck requests"),
        (_differ, "wrong answers"),
        (_compare_nothing, "wrong answers"),
        (_starve_all_but_one, "schedulers that served"),
        (_never_load_one, "models loaded"),
        (_hardly_load, "loads"),
        (_hold_too_much_once, "memory of the runners, MiB"),
        (_promise_too_much_once, "needs of the runners, MiB"),
        (_pause_sampling, "longest time without a sample, s"),
        (_end_sampling_early, "longest time without a sample, s"),
        (_leak_threads, "growth of threads"),
        (_leak_descriptors, "growth of descriptors"),
        (_leave_a_zombie_for_a_while, "longest life of a zombie, s"),
        (_leave_a_runner, "runners left"),
        (_leave_a_zombie, "zombies left"),
        (_leave_descriptors, "descriptors left open"),
        (_stop_early, "end of the phase"),
    ],
)
def test_every_broken_promise_fails_the_matching_check(
    spoil: Callable[[Phase], None], name: str
) -> None:
    phase = _phase()
    spoil(phase)
    assert _bad(phase) == [name]


def test_a_traceback_in_the_log_fails_the_run() -> None:
    run = _run(_phase())
    run.tracebacks = 1
    assert [check.name for check in judge(run) if not check.ok] == ["tracebacks in the log"]


def test_a_run_without_samples_fails() -> None:
    phase = _phase()
    phase.samples = []
    assert _bad(phase) == ["longest time without a sample, s"]


def test_a_zombie_that_is_reaped_soon_is_allowed() -> None:
    phase = _phase()
    for index in (10, 11):
        phase.samples[index] = replace(phase.samples[index], zombies=(7,))
    assert _bad(phase) == []


def test_the_kept_samples_include_the_one_with_the_most_memory() -> None:
    samples = [PoolSample(second, (("small", 1),)) for second in range(5000)]
    samples[1234] = PoolSample(1234, (("small", 9),))
    kept = report.thinned(samples)
    assert len(kept) <= 600
    assert samples[1234] in kept
    assert report.thinned(samples[:10]) == samples[:10]


def test_the_figures_can_be_read_again(tmp_path: Path) -> None:
    run = _run(_phase(), _phase("shared"))
    report.write(run, judge(run), tmp_path / "new" / "pool.json")
    whole = json.loads((tmp_path / "new" / "pool.json").read_text(encoding="utf-8"))
    assert whole["passed"] is True
    assert whole["phases"]["shared"]["endings"]["declined"] == 3
    assert len(whole["samples"]) == 2 * SECONDS
    assert whole["samples"][0][2] == {"large": 120, "small": 80}
    assert len(whole["samples"][0]) == len(whole["sample_columns"])


def test_the_table_has_the_checks_of_each_phase_and_ends_with_the_verdict() -> None:
    run = _run(_phase(), _phase("shared"))
    assert report.table(run, judge(run)).endswith("the soak passed")
    run.phases[1].tally.differing = 1
    run.phases[1].tally.note_problem("an answer differs")
    shown = report.table(run, judge(run))
    assert "FAIL wrong answers" in shown.partition("shared:")[2]
    assert "an answer differs" in shown
    assert shown.endswith("the soak failed: 1 of 34 checks")


def test_the_section_names_machine_phases_and_figures(tmp_path: Path) -> None:
    run = _run(_phase(), _phase("shared"))
    page = tmp_path / "pool.md"
    page.write_text("before\n<!-- x: generated -->\nold\n<!-- x: end -->\nafter\n")
    replace_part(page, "x", report.section(run, judge(run), "../soak/results/pool.svg"))
    text = page.read_text(encoding="utf-8")
    for words in (
        "before\n",
        "2 cores, An OS, Python 3.11.0",
        "The soak passed.",
        "One pool: 30 requests in 1.66667 min",
        "| wrong refusals | 0 (0) | 0 (0) |",
        "(../soak/results/pool.svg)",
        "\nafter\n",
    ):
        assert words in text
    assert "old" not in text


def test_a_page_without_the_markers_is_an_error(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- x: generated -->\n")
    with pytest.raises(ValueError, match="x: end"):
        replace_part(page, "x", "text")


def test_the_committed_page_has_the_markers(tmp_path: Path) -> None:
    page = tmp_path / "pool.md"
    page.write_text((paths.ROOT / "docs" / "pool.md").read_text(encoding="utf-8"))
    replace_part(page, soaks.POOL_PART, "new text")
    assert page.read_text(encoding="utf-8").count("new text") == 1


def test_each_soak_has_its_own_files() -> None:
    assert program.parse_args(["pool"]).name == "pool"
    assert program.parse_args([]).name == "runner"
    assert len({soak.stem for soak in soaks.SOAKS.values()}) == len(soaks.SOAKS) == 2
