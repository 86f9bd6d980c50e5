"""Turn-taking of contenders, and handling of one that fails."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

pytest.importorskip("tokenizers", reason="no tokenizers (the server extra)")

from bench import fleet as fleets
from bench.contenders import Contender, Setup
from bench.fleet import WARM_UP, Fleet, Sample
from bench.records import ContenderError, Record, Request
from bench.results import Key, Results


class _Steady(Contender):
    name = "steady"
    log: list[str]

    async def start(self) -> None:
        self.log.append(f"start {self.name}")

    async def run(self, requests: Sequence[Request]) -> list[Record]:
        return [Record() for _ in requests]

    async def stop(self) -> None:
        self.log.append(f"stop {self.name}")

    async def quiet(self) -> None:
        pass

    def pause(self) -> None:
        self.log.append(f"pause {self.name}")

    def resume(self) -> None:
        self.log.append(f"resume {self.name}")


class _Other(_Steady):
    name = "other"


class _Unstartable(_Steady):
    name = "unstartable"

    async def start(self) -> None:
        raise ContenderError("it is not installed")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Calls on the contenders, in order."""
    log: list[str] = []
    kinds = {kind.name: kind for kind in (_Steady, _Other, _Unstartable)}
    monkeypatch.setattr(_Steady, "log", log, raising=False)
    monkeypatch.setattr(fleets, "CONTENDERS", kinds)
    return log


async def _started(names: list[str], results: Results) -> Fleet:
    fleet = Fleet("model", Setup(Path("model"), 64), names, results)
    await fleet.start("start")
    return fleet


async def test_one_runs_while_the_others_are_paused(log: list[str]) -> None:
    fleet = await _started(["steady", "other"], Results())
    log.clear()

    async def turn(contender: Contender, index: int) -> list[Sample]:
        log.append(f"{index} {contender.name}")
        return []

    await fleet.rounds("greedy", turn, 2, warm_up=False)
    turns = [("0", "steady"), ("0", "other"), ("1", "other"), ("1", "steady")]
    wanted = [[f"resume {name}", f"{index} {name}", f"pause {name}"] for index, name in turns]
    assert log == [line for lines in wanted for line in lines]


async def test_the_warm_up_does_not_count(log: list[str]) -> None:
    results = Results()
    fleet = await _started(["steady"], results)

    async def turn(_: Contender, index: int) -> list[Sample]:
        return [Sample("rate", 1, float(index))]

    await fleet.rounds("greedy", turn, 2)
    assert results.series == {Key("greedy", "model", "steady", "rate", 1): [0.0, 1.0]}
    assert log[-1] == "pause steady"
    assert WARM_UP < 0


async def test_a_contender_that_cannot_start_is_recorded_and_dropped(log: list[str]) -> None:
    results = Results()
    fleet = await _started(["unstartable", "steady"], results)
    why = "it is not installed"
    assert results.failures == [{"contender": "unstartable", "measure": "start, model", "why": why}]
    assert log == ["stop unstartable", "start steady", "pause steady"]
    await fleet.stop()
    assert log[-1] == "stop steady"


async def test_a_contender_that_fails_in_a_turn_is_stopped_and_dropped(log: list[str]) -> None:
    results = Results()
    fleet = await _started(["steady", "other"], results)

    async def turn(contender: Contender, _: int) -> list[Sample]:
        if contender.name == "other":
            raise ContenderError("it broke")
        return [Sample("rate", 1, 1.0)]

    await fleet.rounds("greedy", turn, 2, warm_up=False)
    assert [failure["why"] for failure in results.failures] == ["it broke"]
    assert log.count("stop other") == 1
    assert results.series == {Key("greedy", "model", "steady", "rate", 1): [1.0, 1.0]}
