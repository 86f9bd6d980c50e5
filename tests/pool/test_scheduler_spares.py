"""Rules of the pool's scheduler about spare processes."""

from __future__ import annotations

import math

from runner_client.pool.scheduling.settings import PoolSettings
from runner_client.pool.scheduling.spares import PAUSE_SECONDS
from runner_client.pool.scheduling.states import (
    Action,
    EndSpare,
    Load,
    ModelState,
    Spare,
    StartSpare,
)
from support.scheduler_driver import SPARE_BYTES, Driver, names


def started(pool: Driver) -> list[Spare]:
    """Let the pool start spare processes, which are ready at once."""
    spares = [action.spare for action in pool.decide() if isinstance(action, StartSpare)]
    for spare in spares:
        spare.is_ready = True
        pool.machine -= spare.held_bytes
    return spares


def load_of(actions: list[Action]) -> Load:
    """Return the only action, which is a load."""
    (action,) = actions
    assert isinstance(action, Load)
    return action


def test_a_pool_keeps_none_by_default() -> None:
    assert PoolSettings().spare_processes == 0
    assert Driver().decide() == []


def test_as_many_are_started_as_the_settings_say() -> None:
    pool = Driver(spare_processes=2)
    assert names(pool.decide()) == [("StartSpare", "")] * 2
    assert pool.decide() == []
    assert pool.scheduler.held_bytes == 2 * SPARE_BYTES


def test_a_load_takes_one_and_counts_its_memory_once() -> None:
    pool = Driver(budget=60, machine=60, spare_processes=1)
    (spare,) = started(pool)
    model = pool.model("a", 60)
    pool.ask(model)
    assert load_of(pool.decide()).spare is spare
    assert pool.scheduler.held_bytes == 60


def test_another_one_is_started_once_the_model_is_loaded() -> None:
    pool = Driver(spare_processes=1)
    started(pool)
    model = pool.model("a", 60)
    pool.ask(model)
    pool.decide()
    assert pool.decide() == []
    pool.scheduler.loaded(pool.now, model, 60)
    assert names(pool.decide()) == [("Grant", "a"), ("StartSpare", "")]


def test_one_that_is_starting_is_taken_if_there_is_no_other() -> None:
    pool = Driver(spare_processes=2)
    starting, ready = (action.spare for action in pool.decide() if isinstance(action, StartSpare))
    ready.is_ready = True
    pool.ask(pool.model("a", 30))
    assert load_of(pool.decide()).spare is ready
    pool.ask(pool.model("b", 30))
    assert load_of(pool.decide()).spare is starting


def test_none_is_started_beyond_the_budget() -> None:
    pool = Driver(budget=69, spare_processes=1)
    pool.use(pool.model("a", 60))
    assert pool.decide(PAUSE_SECONDS) == []
    assert pool.scheduler.held_bytes == 60


def test_one_leaves_the_reserve_free() -> None:
    pool = Driver(budget=None, machine=29, spare_processes=1)
    assert pool.scheduler.decide(pool.now, pool.machine, reserve_bytes=20) == []
    pool.now += PAUSE_SECONDS
    assert names(pool.scheduler.decide(pool.now, pool.machine, 19)) == [("StartSpare", "")]


def test_a_machine_without_room_is_measured_again_after_a_pause() -> None:
    pool = Driver(budget=None, machine=0, spare_processes=1)
    assert pool.decide() == []
    assert not pool.scheduler.wants_spare(pool.now)
    assert pool.scheduler.next_decision(pool.now) == pool.now + PAUSE_SECONDS
    pool.machine = SPARE_BYTES
    assert names(pool.decide(PAUSE_SECONDS)) == [("StartSpare", "")]
    assert pool.scheduler.next_decision(pool.now) == math.inf


def test_spares_go_before_models() -> None:
    pool = Driver(budget=100, spare_processes=3)
    spares = started(pool)
    idle, other = pool.model("idle", 60), pool.model("other", 40)
    pool.use(idle)
    assert pool.scheduler.held_bytes == 60 + 3 * SPARE_BYTES
    ticket = pool.ask(other)
    # One spare process is for the load, and the two others are enough.
    actions = pool.decide()
    assert names(actions) == [("EndSpare", "")] * 2
    assert "stopping spare processes" in ticket.reason
    assert pool.decide() == []
    for action in actions:
        assert isinstance(action, EndSpare)
        pool.scheduler.spares.gone(action.spare)
    assert load_of(pool.decide()).spare in spares
    assert idle.state is ModelState.READY


def test_a_spare_stays_if_a_model_has_to_go_anyway() -> None:
    pool = Driver(budget=100, spare_processes=2)
    started(pool)
    pool.use(pool.model("idle", 70))
    assert pool.scheduler.held_bytes == 70 + 2 * SPARE_BYTES
    pool.ask(pool.model("other", 90))
    assert names(pool.decide()) == [("Evict", "idle")]


def test_spares_refuse_nobody() -> None:
    pool = Driver(budget=100, spare_processes=3)
    started(pool)
    pool.use(pool.model("idle", 60))
    assert pool.scheduler.held_bytes == 60 + 3 * SPARE_BYTES
    other = pool.model("other", 40)
    for may_evict in (False, True, False):
        pool.ask(other, may_evict=may_evict)
    for action in pool.decide():
        assert isinstance(action, EndSpare)
        pool.scheduler.spares.gone(action.spare)
    assert load_of(pool.decide()).model is other


def test_a_refused_eviction_does_not_count_spares() -> None:
    pool = Driver(budget=100, spare_processes=3)
    started(pool)
    pool.use(pool.model("idle", 60))
    assert pool.scheduler.held_bytes == 60 + 3 * SPARE_BYTES
    ticket = pool.ask(pool.model("other", 45), may_evict=False)
    (refusal,) = pool.decide()
    assert names([refusal]) == [("Refuse", "other")]
    assert pool.scheduler.waiting() == ()
    assert getattr(refusal, "available_bytes", None) == 40
    assert ticket.model.state is ModelState.ABSENT


def test_only_the_next_one_is_started_while_requests_wait() -> None:
    pool = Driver(budget=100, spare_processes=2)
    pool.scheduler.spares.pause_until(5.0)
    pool.lease(pool.model("busy", 60))
    pool.ask(pool.model("other", 60))
    assert pool.decide() == []
    assert pool.scheduler.next_decision(pool.now) <= 5.0
    assert names(pool.decide(5.0)) == [("StartSpare", "")]
    assert pool.decide() == []


def test_one_that_was_stopped_is_replaced_after_a_pause() -> None:
    pool = Driver(spare_processes=1)
    (spare,) = started(pool)
    end = pool.scheduler.spares.end_one(pool.now, "pressure")
    assert end == EndSpare(spare, "pressure")
    assert pool.scheduler.spares.end_one(pool.now, "pressure") is None
    assert pool.scheduler.held_bytes == SPARE_BYTES
    pool.scheduler.spares.gone(spare)
    assert pool.decide(PAUSE_SECONDS - 0.1) == []
    assert names(pool.decide(0.2)) == [("StartSpare", "")]


def test_one_that_died_is_replaced_at_once() -> None:
    pool = Driver(spare_processes=1)
    (spare,) = started(pool)
    pool.scheduler.spares.gone(spare)
    assert names(pool.decide()) == [("StartSpare", "")]
