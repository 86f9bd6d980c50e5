"""Trace, naive scheduler, tables and plot of the pool benchmark."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from typing import Any, Self

import pytest

pytest.importorskip("tokenizers", reason="no tokenizers (the server extra)")

from bench import paths
from bench.contenders import Setup
from bench.page import replace_part
from bench.pool import __main__ as program
from bench.pool import measures, schedulers
from bench.pool.measures import COLD, MODEL, RESIDENT, SWAP, TRACE, WARM
from bench.pool.report import render, swap_table, trace_table
from bench.pool.schedulers import CAPACITY, NaiveLru
from bench.pool.trace import MAX_BURST, PooledRequest, make_trace
from bench.records import Prompt, Record, Request
from bench.results import Key, Results
from support.bench_results import ABOUT

MODELS = ("a", "b", "c")
PROMPT = Prompt(" a", (1,))


def _trace(seconds: float = 600.0, seed: int = 0) -> list[PooledRequest]:
    return make_trace(MODELS, seconds, lambda: PROMPT, seed)


def test_the_same_seed_makes_the_same_trace() -> None:
    assert _trace() == _trace()
    assert _trace() != _trace(seed=1)


def test_requests_are_in_order_and_in_time() -> None:
    times = [request.delay_seconds for request in _trace()]
    assert times[0] == 0
    assert times == sorted(times)
    assert 500 < times[-1] <= 600
    assert _trace(0.0)


def test_models_alternate_in_bursts() -> None:
    models = [request.model for request in _trace()]
    assert set(models) == set(MODELS)
    lengths, length = [], 1
    for one, next_ in itertools.pairwise(models):
        if one == next_:
            length += 1
        else:
            lengths.append(length)
            length = 1
    assert set(lengths) == set(range(1, MAX_BURST + 1))


class _Server:
    """Stands in for a server process; ``log`` has the calls, by name of the model."""

    log: list[str]
    gates: dict[str, asyncio.Event]

    def __init__(self, setup: Setup) -> None:
        self._name = setup.model.name

    async def start(self) -> None:
        self.log.append(f"start {self._name}")

    def probes(self) -> dict[str, Any]:
        async def check() -> None:
            self.log.append(f"check {self._name}")

        return {"health": check}

    async def stream(self, _request: Request, _record: Record) -> None:
        self.log.append(f"stream {self._name}")
        if self._name in self.gates:
            await self.gates[self._name].wait()

    async def stop(self) -> None:
        self.log.append(f"stop {self._name}")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Calls on the servers, in order."""
    log: list[str] = []
    monkeypatch.setattr(_Server, "log", log, raising=False)
    monkeypatch.setattr(_Server, "gates", {}, raising=False)
    monkeypatch.setattr(schedulers, "MlxLmServer", _Server)
    return log


def _naive() -> NaiveLru:
    return NaiveLru({name: Path(name) for name in MODELS})


async def _ask(scheduler: NaiveLru, *models: str) -> None:
    for model in models:
        await scheduler.stream(model, Request(PROMPT, 1), Record())


async def test_the_least_recently_used_server_makes_room(log: list[str]) -> None:
    async with _naive() as scheduler:
        await _ask(scheduler, "a", "b", "a")
        log.clear()
        await _ask(scheduler, "c")
        assert log == ["stop b", "start c", "check c", "stream c"]
        assert scheduler.loads == CAPACITY + 1
        log.clear()
    assert sorted(log) == ["stop a", "stop c"]


async def test_a_server_in_use_is_not_stopped_and_others_go_on(log: list[str]) -> None:
    async with _naive() as scheduler:
        await _ask(scheduler, "a", "b")
        gate = _Server.gates["a"] = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            group.create_task(_ask(scheduler, "a"))
            await asyncio.sleep(0)
            # The least recently used one is b, and then a, which is in use.
            await _ask(scheduler, "c")
            log.clear()
            swap = group.create_task(_ask(scheduler, "b"))
            await asyncio.sleep(0)
            await _ask(scheduler, "c")
            assert log == ["stream c"]
            assert not swap.done()
            gate.set()
        assert log == ["stream c", "stop a", "start b", "check b", "stream b"]


async def test_one_server_is_started_for_simultaneous_requests(log: list[str]) -> None:
    async with _naive() as scheduler:
        await asyncio.gather(*(_ask(scheduler, "a") for _ in range(3)))
    assert log.count("start a") == 1
    assert log.count("stream a") == 3


class _Scheduler(schedulers.Scheduler):
    name = "a scheduler"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def stream(self, model: str, request: Request, record: Record) -> None:
        self.loads += model == "b"
        record.chunks.append((record.sent + (2.0 if model == "b" else 0.5), request.max_tokens))
        record.prompt_tokens = len(request.prompt.token_ids)
        record.completion_tokens = request.max_tokens


async def test_a_turn_measures_rate_percentiles_and_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    async def no_swaps(*_: object) -> list[float]:
        return [1.5]

    monkeypatch.setattr(measures, "_swaps", no_swaps)
    trace = [PooledRequest(PROMPT, 4, model=model) for model in ("a", "a", "b")]
    results = Results()
    await measures._turn(_Scheduler({}), trace, None, results)  # type: ignore[arg-type]

    def value(metric: str) -> list[float]:
        return results.values(TRACE, MODEL, "a scheduler", metric, 1)

    assert value("rate") == [pytest.approx(60 * 3 / 2, rel=0.05)]
    assert value("p50_seconds") == [pytest.approx(0.5)]
    assert value("p95_seconds") == [pytest.approx(2.0)]
    assert value("ttft_seconds") == pytest.approx([0.5, 0.5, 2.0])
    assert value("swap_seconds") == [1.5]
    assert value("loads_count") == [1]
    assert len(value("peak_bytes")) == 1
    assert set(results.timelines) == {"a scheduler, seconds", "a scheduler, MiB"}


def _results() -> Results:
    results = Results(about=ABOUT)
    for metric, values in {
        "rate": [30.0, 40.0, 35.0],
        "p50_seconds": [0.5],
        "p95_seconds": [2.5],
        "swap_seconds": [1.25],
        "loads_count": [7.0],
        "peak_bytes": [300.0 * 2**20],
        "ttft_seconds": [0.5, 2.5],
    }.items():
        results.series[Key(TRACE, MODEL, "RunnerPool", metric, 1)] = values
    results.timelines |= {"RunnerPool, seconds": [0.0, 0.3], "RunnerPool, MiB": [100.0, 300.0]}
    for name, values in {COLD: [2.0, 4.0], WARM: [1.0, 1.0], RESIDENT: [0.02, 0.02]}.items():
        results.series[Key(SWAP, MODEL, name, "ttft_seconds", 1)] = values
    return results


def test_the_table_has_a_row_for_each_scheduler() -> None:
    row = trace_table(_results()).splitlines()[-1]
    assert row == "| RunnerPool | 35 (30 to 40) | 500 ms | 2.5 s | 1.25 s | 7 | 300 MiB |"


def test_swaps_are_compared_round_by_round() -> None:
    rows = swap_table(_results()).splitlines()[2:]
    assert [row.split(" | ")[-1] for row in rows] == [
        "1 |",
        "0.375 (0.25 to 0.5) |",
        "0.0075 (0.005 to 0.01) |",
    ]


def test_the_section_names_machine_figures_and_failures() -> None:
    results = _results()
    results.fail("naive LRU", TRACE, "it broke")
    text = render(results, ["pool.svg"], "../bench/results")
    for words in (
        "A CPU, 2 cores, 8 GiB, An OS, Python 3.11.0",
        "(../bench/results/pool.json)",
        "(../bench/results/pool.svg)",
        "| RunnerPool |",
        "| warm |",
        "naive LRU: it broke",
    ):
        assert words in text
    assert "| warm |" not in render(Results(about=ABOUT), [], ".")


def test_the_committed_page_has_the_markers(tmp_path: Path) -> None:
    page = tmp_path / "pool.md"
    page.write_text((paths.ROOT / "docs" / "pool.md").read_text(encoding="utf-8"))
    replace_part(page, program.PART, "new text")
    assert page.read_text(encoding="utf-8").count("new text") == 1


def test_only_a_full_run_changes_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="no matplotlib (the bench group)")
    page = tmp_path / "docs" / "pool.md"
    page.parent.mkdir()
    old = f"<!-- {program.PART}: generated -->\nold\n<!-- {program.PART}: end -->\n"
    page.write_text(old)
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    program.write(_results(), tmp_path / "bench" / ".scratch", full=False)
    assert page.read_text(encoding="utf-8") == old
    assert "| warm |" in (tmp_path / "bench" / ".scratch" / "pool.md").read_text(encoding="utf-8")
    program.write(_results(), tmp_path / "bench" / "results", full=True)
    assert "(../bench/results/pool.svg)" in page.read_text(encoding="utf-8")
    assert (tmp_path / "bench" / "results" / "pool.svg").stat().st_size > 0
