"""Output files of a benchmark run."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("tokenizers", reason="no tokenizers (the server extra)")
pytest.importorskip("matplotlib", reason="no matplotlib (the bench group)")

from bench import __main__ as program
from bench import paths
from bench.results import Key, Results
from support.bench_results import ABOUT


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    monkeypatch.setattr(paths, "REPORT", tmp_path / "docs" / "benchmarks.md")
    (tmp_path / "docs").mkdir()
    return tmp_path


def _results() -> Results:
    return Results(ABOUT, {Key("greedy", "demo", "ours", "rate", 16): [1.0, 2.0]})


def test_a_full_run_writes_the_report_with_working_links(root: Path) -> None:
    folder = root / "bench" / "results"
    program._write(_results(), folder, 3, full=True)
    report = (root / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert "(../bench/results/throughput-demo.svg)" in report
    assert (folder / "throughput-demo.svg").stat().st_size > 0
    assert Results.read(folder / "results.json").series == _results().series


def test_a_partial_run_does_not_touch_the_report(root: Path) -> None:
    folder = root / "bench" / ".scratch"
    program._write(_results(), folder, 3, full=False)
    assert "(./throughput-demo.svg)" in (folder / "benchmarks.md").read_text(encoding="utf-8")
    assert not (root / "docs" / "benchmarks.md").exists()
