"""Progress of the engine, as seen by other threads."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from runner_server.engine.health.heartbeat import Heartbeat


@pytest.mark.parametrize(
    "report",
    [
        lambda heartbeat: heartbeat.beat(),
        lambda heartbeat: heartbeat.step(),
        lambda heartbeat: heartbeat.set_idle(is_idle=False),
    ],
    ids=["beat", "step", "idle"],
)
def test_each_report_is_progress(
    report: Callable[[Heartbeat], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    heartbeat = Heartbeat()
    now += 5
    assert heartbeat.age() == pytest.approx(5)
    report(heartbeat)
    assert heartbeat.age() == 0


def test_only_steps_are_counted() -> None:
    heartbeat = Heartbeat()
    assert heartbeat.is_idle
    heartbeat.set_idle(is_idle=False)
    heartbeat.beat()
    heartbeat.step()
    assert (heartbeat.step_count, heartbeat.is_idle) == (1, False)
