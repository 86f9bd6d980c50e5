"""The time limits of streams and loads, with explicit clock readings."""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from typing import Any

import pytest

from mlxrunner.v1 import runner_pb2 as pb
from runner_client import errors
from runner_client.rpc.messages.responses import status as status_of
from runner_client.rpc.transport.waits import LoadWatch, StreamTimer
from runner_client.rpc.transport.watchdog import Watchdog
from runner_client.types import (
    CompletionChunk,
    PromptProgress,
    RestartPolicy,
    State,
    Status,
    Timeouts,
)

PROGRESS = CompletionChunk(prompt_progress=PromptProgress(1, 2))
TEXT = CompletionChunk(content="x", token_ids=(1,))


def timer(first: float | None = 100.0, idle: float | None = 10.0) -> StreamTimer:
    return StreamTimer(Timeouts(first_token_seconds=first, idle_seconds=idle))


def test_before_any_message_only_the_first_token_limit_runs() -> None:
    assert timer().deadline(1000.0) == 1100.0


def test_the_first_token_limit_runs_from_the_first_wait() -> None:
    stream = timer(idle=None)
    stream.deadline(1000.0)
    stream.received(PROGRESS)
    assert stream.deadline(1090.0) == 1100.0


def test_after_a_progress_message_both_limits_run() -> None:
    stream = timer()
    stream.deadline(1000.0)
    stream.received(PROGRESS)
    assert stream.deadline(1050.0) == 1060.0
    assert stream.deadline(1095.0) == 1100.0


def test_after_the_first_token_only_the_idle_limit_runs() -> None:
    stream = timer()
    stream.deadline(1000.0)
    stream.received(TEXT)
    assert stream.deadline(5000.0) == 5010.0


def test_without_limits_the_deadline_is_infinite() -> None:
    stream = timer(first=None, idle=None)
    assert stream.deadline(0.0) == math.inf
    stream.received(TEXT)
    assert stream.deadline(0.0) == math.inf


def test_the_error_names_the_limit() -> None:
    stream = timer()
    stream.deadline(1000.0)
    assert stream.expired(1100.0).phase == "first_token"
    stream.received(PROGRESS)
    assert stream.expired(1050.0).phase == "idle"
    assert stream.expired(1100.0).phase == "first_token"
    stream.received(TEXT)
    assert stream.expired(5000.0).phase == "idle"


def status(progress: int, age: float | None = None) -> Status:
    made = status_of(pb.StatusResponse(state=pb.STATE_LOADING, progress=progress))
    return dataclasses.replace(made, last_progress_age_seconds=age)


def test_rising_progress_counts_as_movement() -> None:
    watch = LoadWatch(10.0, now=0.0)
    for second in range(100):
        watch.observe(status(progress=second), now=float(second))
    with pytest.raises(errors.RunnerTimeoutError, match="at 99 %"):
        watch.observe(status(progress=99), now=109.0)


def test_a_recent_engine_step_counts_as_movement() -> None:
    watch = LoadWatch(10.0, now=0.0)
    for second in range(100):
        watch.observe(status(progress=50, age=0.5), now=float(second))
    watch.observe(status(progress=50, age=9.0), now=108.0)
    with pytest.raises(errors.RunnerTimeoutError):
        watch.observe(status(progress=50, age=12.0), now=110.0)


def test_a_change_of_state_counts_as_movement() -> None:
    watch = LoadWatch(10.0, now=0.0)
    watch.observe(status(progress=0), now=0.0)
    idle = dataclasses.replace(status(progress=0), state=State.IDLE)
    watch.observe(idle, now=9.0)
    watch.observe(idle, now=18.0)


def test_an_unavailable_status_does_not_count_as_movement() -> None:
    watch = LoadWatch(10.0, now=0.0)
    watch.observe(None, now=9.0)
    with pytest.raises(errors.RunnerTimeoutError):
        watch.observe(None, now=10.0)


def test_a_load_without_a_limit_never_times_out() -> None:
    LoadWatch(None, now=0.0).observe(None, now=1e9)


def test_the_watchdog_calls_back_in_order_and_once() -> None:
    watchdog, called, last = Watchdog(), list[int](), threading.Event()
    now = time.monotonic()
    watchdog.arm(1, now + 600, lambda: called.append(1))
    watchdog.arm(2, now + 0.1, lambda: called.append(2))
    watchdog.arm(3, now + 0.2, last.set)
    assert last.wait(10)
    assert called == [2]


def test_a_disarmed_deadline_is_forgotten() -> None:
    watchdog, called, last = Watchdog(), list[int](), threading.Event()
    now = time.monotonic()
    # A second, within which even a busy machine disarms.
    watchdog.arm(1, now + 1.0, lambda: called.append(1))
    watchdog.disarm(1)
    watchdog.disarm(1)
    watchdog.arm(2, now + 1.1, last.set)
    assert last.wait(10)
    assert called == []


def test_an_infinite_deadline_needs_no_thread() -> None:
    before = threading.active_count()
    Watchdog().arm(1, math.inf, lambda: None)
    assert threading.active_count() == before


def test_an_idle_watchdog_thread_ends_and_starts_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runner_client.rpc.transport.watchdog._LINGER_SECONDS", 0.05)
    watchdog = Watchdog()
    for _ in range(2):
        fired = threading.Event()
        watchdog.arm(1, time.monotonic(), fired.set)
        assert fired.wait(10)
        deadline = time.monotonic() + 10
        while watchdog._thread is not None:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Timeouts)])
@pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan])
def test_an_invalid_timeout_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        Timeouts(**{name: value})


def test_the_grace_time_grows_with_the_model() -> None:
    assert Timeouts(close_seconds=5).close_grace_seconds(0) == 5
    assert Timeouts(close_seconds=5).close_grace_seconds(40 * 2**30) == 15


def test_restarts_are_bounded_within_the_window() -> None:
    policy = RestartPolicy(max_restarts=2, window_seconds=100)
    assert policy.allows((), now=0)
    assert policy.allows((0.0,), now=1)
    assert not policy.allows((0.0, 1.0), now=99)
    assert policy.allows((0.0, 1.0), now=100)
    assert not RestartPolicy(max_restarts=0).allows((), now=0)
    with pytest.raises(ValueError, match="max_restarts"):
        RestartPolicy(max_restarts=-1)


@pytest.mark.parametrize("name", ["call_seconds", "close_seconds"])
def test_some_timeouts_need_a_number(name: str) -> None:
    none: dict[str, Any] = {name: None}
    with pytest.raises(ValueError, match=f"{name} must be above 0, not None"):
        Timeouts(**none)
