"""One life of a child: what a start creates, a close releases, whatever overtakes it."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest

from runner_client import LoadOptions, MemoryGate, RunnerProcess, Timeouts, errors
from runner_client.process.child import Child
from runner_client.process.launch import Launch, Plan
from runner_client.process.life import ChildLife
from support.fake_child import use_fake_child, wait_until, write_model
from support.process_view import ProcessView


@pytest.fixture
def gate() -> MemoryGate:
    return MemoryGate(settle_seconds=0)


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gate: MemoryGate) -> Launch:
    use_fake_child(monkeypatch)
    return Launch(
        model=str(write_model(tmp_path / "tiny", weight_bytes=2**20)),
        options=LoadOptions(),
        require_full=False,
        gate=gate,
        listen="unix",
        blas="off",
        env=None,
        log=None,
    )


def reserved(gate: MemoryGate, plan: Plan) -> int:
    return gate.check(plan.estimate, override=True).reserved_bytes


def test_a_close_releases_what_the_start_created(launch: Launch, gate: MemoryGate) -> None:
    life: ChildLife[object] = ChildLife(launch, Timeouts())
    plan, child, ready = life.start()
    folder = Path(ready.target.removeprefix("unix:"))
    assert (life.plan, life.child, life.ready) == (plan, child, ready)
    for _ in range(2):
        life.close()
        assert life.is_over
        assert child.exit_code == 0
        assert not folder.exists()
        assert reserved(gate, plan) == 0


def test_a_start_is_refused_once_its_life_is_closed(
    launch: Launch, gate: MemoryGate, monkeypatch: pytest.MonkeyPatch
) -> None:
    life: ChildLife[object] = ChildLife(launch, Timeouts())
    plans: list[Plan] = []
    plan_of = Launch.plan

    def closed_meanwhile(launch: Launch) -> Plan:
        plans.append(plan_of(launch))
        assert reserved(gate, plans[0]) > 0
        life.close()
        return plans[0]

    monkeypatch.setattr(Launch, "plan", closed_meanwhile)
    with pytest.raises(errors.RunnerUnavailableError, match="closed while it was starting"):
        life.start()
    assert life.child is None
    assert reserved(gate, plans[0]) == 0


def test_a_failed_start_is_released_by_the_close(
    launch: Launch, gate: MemoryGate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_child: Child) -> None:
        raise errors.RunnerUnavailableError("no more processes")

    monkeypatch.setattr(Child, "start", fail)
    life: ChildLife[object] = ChildLife(launch, Timeouts())
    with pytest.raises(errors.RunnerUnavailableError, match="no more processes"):
        life.start()
    assert life.plan is not None
    assert reserved(gate, life.plan) > 0
    life.close()
    assert life.is_over
    assert reserved(gate, life.plan) == 0


def test_a_call_during_the_start_is_told_to_wait(launch: Launch) -> None:
    life: ChildLife[object] = ChildLife(launch, Timeouts())
    with pytest.raises(errors.RunnerUnavailableError, match="still starting"):
        life.require_connection()
    life.close()
    with pytest.raises(errors.RunnerUnavailableError, match="not started"):
        life.require_connection()


def test_a_runner_without_a_start_has_no_open_life(launch: Launch) -> None:
    life: ChildLife[object] = ChildLife.over(launch, Timeouts())
    assert life.is_over
    assert life.memory_bytes == 0
    with pytest.raises(errors.RunnerUnavailableError, match="not started"):
        life.require_connection()


def test_a_restart_lets_go_of_the_earlier_child(launch: Launch) -> None:
    with RunnerProcess(launch.model) as runner:
        earlier = weakref.ref(ProcessView.of(runner).child)
        runner.restart()

        def is_released() -> bool:
            gc.collect()
            return earlier() is None

        wait_until(is_released)
