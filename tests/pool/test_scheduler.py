"""Rules of the pool's scheduler, one by one."""

from __future__ import annotations

import math

import pytest

from runner_client.pool.scheduling.scheduler import SETTLE_SECONDS
from runner_client.pool.scheduling.states import Grant, ModelState, Refuse
from support.scheduler_driver import Driver, names


def test_requests_of_one_model_share_a_load() -> None:
    pool = Driver()
    model = pool.model("a", 60)
    tickets = [pool.ask(model) for _ in range(3)]
    assert names(pool.decide()) == [("Load", "a")]
    assert pool.decide() == []
    pool.scheduler.loaded(pool.now, model, 60)
    actions = pool.decide()
    assert [action.ticket for action in actions if isinstance(action, Grant)] == tickets
    assert model.leases == 3


def test_models_that_fit_load_at_the_same_time() -> None:
    pool = Driver()
    for name in "ab":
        pool.ask(pool.model(name, 50))
    assert names(pool.decide()) == [("Load", "a"), ("Load", "b")]


def test_the_least_recently_used_model_goes() -> None:
    pool = Driver()
    first, second, third = (pool.model(name, 40) for name in "abc")
    pool.use(first)
    pool.now += 1
    pool.use(second)
    pool.now += 1
    pool.use(first)
    pool.ask(third)
    assert names(pool.decide(1.0)) == [("Evict", "b")]
    assert pool.decide() == []
    pool.scheduler.gone(second)
    assert names(pool.decide()) == [("Load", "c")]


def test_a_model_of_lower_priority_goes_first() -> None:
    pool = Driver()
    low, high = pool.model("low", 40, priority=-1), pool.model("high", 40)
    pool.use(high)
    pool.now += 1
    pool.use(low)
    pool.ask(pool.model("c", 40))
    assert names(pool.decide(1.0)) == [("Evict", "low")]


def test_no_more_models_go_than_needed() -> None:
    pool = Driver()
    small, large = pool.model("small", 20), pool.model("large", 70)
    pool.use(small)
    pool.now += 1
    pool.use(large)
    pool.ask(pool.model("c", 60))
    assert names(pool.decide(1.0)) == [("Evict", "large")]


def test_nothing_goes_if_it_would_not_be_enough() -> None:
    pool = Driver()
    idle, used = pool.model("idle", 30), pool.model("used", 60)
    pool.use(idle)
    pool.lease(used)
    ticket = pool.ask(pool.model("c", 80))
    assert pool.decide() == []
    assert "used, used by 1" in ticket.reason
    assert "yield in 10 s" in ticket.reason


def test_a_used_model_yields_after_the_longest_wait() -> None:
    pool = Driver(max_wait_seconds=10.0)
    model, other = pool.model("a", 60), pool.model("b", 60)
    lease = pool.lease(model)
    pool.ask(other)
    assert pool.decide(9.0) == []
    # Requests of the loaded model are served while the other waits.
    pool.scheduler.release(pool.now, pool.lease(model))
    assert pool.decide(1.0) == []
    late = pool.ask(model)
    assert pool.decide() == []
    pool.scheduler.release(pool.now, lease)
    assert names(pool.decide()) == [("Evict", "a")]
    pool.scheduler.gone(model)
    assert names(pool.decide()) == [("Load", "b")]
    assert late.reason.startswith("waiting for")


def test_a_yielding_model_is_used_again_if_nobody_waits_any_more() -> None:
    pool = Driver(max_wait_seconds=0.0)
    model = pool.model("a", 60)
    pool.lease(model)
    ticket = pool.ask(pool.model("b", 60))
    assert pool.decide() == []
    pool.ask(model)
    assert pool.decide() == []
    pool.scheduler.cancel(ticket)
    assert names(pool.decide()) == [("Grant", "a")]


@pytest.mark.parametrize(("load_seconds", "stay"), [(1.0, 5.0), (8.0, 8.0)])
def test_a_model_stays_for_the_residence_or_as_long_as_its_load_took(
    load_seconds: float, stay: float
) -> None:
    pool = Driver(min_residence_seconds=5.0)
    model = pool.model("a", 60)
    pool.ask(model, is_lease=False)
    pool.decide()
    pool.now += load_seconds
    pool.scheduler.loaded(pool.now, model, 60)
    ticket = pool.ask(pool.model("b", 60))
    assert names(pool.decide(stay - 0.5)) == [("Grant", "a")]
    assert ticket.reason == "waiting for 20 B: a, idle for 0 s, which may go in 0.5 s"
    assert names(pool.decide(0.49)) == []
    assert names(pool.decide(0.02)) == [("Evict", "a")]


def test_a_pinned_model_stays() -> None:
    pool = Driver()
    pool.use(pool.model("pinned", 60, pinned=True, keep_alive_seconds=1.0))
    pool.ask(pool.model("b", 60))
    (refusal,) = pool.decide(100.0)
    assert isinstance(refusal, Refuse)
    assert (refusal.required_bytes, refusal.available_bytes) == (60, 40)
    assert "of which pinned models hold 60 B" in refusal.text


def test_an_idle_model_goes_after_the_keep_alive() -> None:
    pool = Driver()
    model = pool.model("a", 60, keep_alive_seconds=5.0)
    pool.use(model)
    assert pool.scheduler.next_decision(pool.now) == 5.0
    assert pool.decide(4.9) == []
    assert names(pool.decide(0.2)) == [("Evict", "a")]


def test_a_chosen_keep_alive_lasts_until_the_model_goes() -> None:
    pool = Driver()
    model = pool.model("a", 60, keep_alive_seconds=5.0)
    pool.use(model)
    model.chosen_seconds = 8.0
    assert pool.decide(7.9) == []
    assert names(pool.decide(0.2)) == [("Evict", "a")]
    pool.scheduler.gone(model)
    assert model.keep_alive_seconds == 5.0


def test_a_keep_alive_of_zero_evicts_once_the_last_lease_ends() -> None:
    pool = Driver()
    model = pool.model("a", 60)
    lease = pool.lease(model)
    model.chosen_seconds = 0.0
    assert pool.decide(10.0) == []
    pool.scheduler.release(pool.now, lease)
    assert names(pool.decide()) == [("Evict", "a")]


def test_an_endless_keep_alive_pins() -> None:
    pool = Driver()
    model = pool.model("a", 60, keep_alive_seconds=1.0)
    pool.use(model)
    model.chosen_seconds = math.inf
    pool.ask(pool.model("b", 60))
    (refusal,) = pool.decide(100.0)
    assert isinstance(refusal, Refuse)
    assert "of which pinned models hold 60 B" in refusal.text


def test_a_request_to_load_a_loaded_model_counts_as_use() -> None:
    pool = Driver()
    model = pool.model("a", 60, keep_alive_seconds=5.0)
    pool.use(model)
    pool.now += 5.0
    pool.ask(model, is_lease=False)
    assert names(pool.decide()) == [("Grant", "a")]


def test_a_caller_may_ask_to_be_refused_instead_of_an_eviction() -> None:
    pool = Driver()
    pool.use(pool.model("a", 60))
    pool.ask(pool.model("b", 60), may_evict=False)
    (refusal,) = pool.decide(3.0)
    assert isinstance(refusal, Refuse)
    assert "20 B more than is free; would have to go: a, idle for 3 s" in refusal.text


def test_a_caller_who_refuses_evictions_does_not_overtake() -> None:
    pool = Driver()
    pool.lease(pool.model("a", 60))
    pool.ask(pool.model("b", 60))
    small = pool.model("c", 10)
    pool.ask(small, may_evict=False)
    (refusal,) = pool.decide()
    assert isinstance(refusal, Refuse)
    assert "c needs 10 B, and what is free is kept for requests that came before" in refusal.text
    assert (refusal.required_bytes, refusal.available_bytes) == (10, 0)


def test_requests_wait_behind_the_first_that_needs_room() -> None:
    pool = Driver()
    pool.lease(pool.model("a", 60))
    pool.ask(pool.model("b", 60))
    small = pool.ask(pool.model("c", 10))
    assert pool.decide() == []
    assert small.reason == "waiting for the requests before it"


def test_priority_counts_as_waiting_time() -> None:
    pool = Driver(ageing_seconds=10.0)
    pool.lease(pool.model("a", 90))
    normal = pool.ask(pool.model("b", 60))
    pool.now += 5
    urgent = pool.ask(pool.model("c", 60, priority=1))
    pool.now += 10
    late = pool.ask(pool.model("d", 60, priority=1))
    assert pool.scheduler.waiting() == (urgent, normal, late)


def test_a_load_that_nobody_waits_for_is_cancelled() -> None:
    pool = Driver()
    model = pool.model("a", 60)
    ticket = pool.ask(model)
    pool.decide()
    pool.scheduler.cancel(ticket)
    assert names(pool.decide()) == [("Evict", "a")]


def test_a_lease_of_an_earlier_life_ends_without_effect() -> None:
    pool = Driver()
    model = pool.model("a", 60)
    lease = pool.lease(model)
    pool.scheduler.gone(model)
    pool.lease(model)
    pool.scheduler.release(pool.now, lease)
    assert model.leases == 1


def test_a_model_needs_its_required_bytes_and_no_more() -> None:
    pool = Driver(budget=None, machine=50)
    pool.ask(pool.model("a", 60, 50))
    assert names(pool.decide()) == [("Load", "a")]


def test_a_second_load_does_not_get_the_bytes_of_the_first() -> None:
    pool = Driver(budget=None, machine=100)
    for name in "ab":
        pool.ask(pool.model(name, 60))
    assert names(pool.decide()) == [("Load", "a")]


def test_too_little_memory_refuses_after_it_has_settled() -> None:
    pool = Driver(budget=None, machine=40)
    pool.ask(pool.model("a", 60))
    assert pool.decide() == []
    assert pool.decide(SETTLE_SECONDS - 0.1) == []
    (refusal,) = pool.decide(0.2)
    assert isinstance(refusal, Refuse)
    assert (refusal.required_bytes, refusal.available_bytes) == (60, 40)


def test_memory_that_comes_back_in_time_is_used() -> None:
    pool = Driver(budget=None, machine=40)
    pool.ask(pool.model("a", 60))
    assert pool.decide() == []
    pool.machine = 60
    assert names(pool.decide(SETTLE_SECONDS + 1)) == [("Load", "a")]


def test_an_earlier_shortage_does_not_shorten_the_wait() -> None:
    pool = Driver(budget=None, machine=40)
    model = pool.model("a", 60)
    ticket = pool.ask(model)
    pool.decide()
    pool.scheduler.cancel(ticket)
    pool.decide()
    pool.now += 60
    pool.ask(model)
    assert pool.decide() == []


def test_every_request_for_a_hopeless_model_is_refused_together() -> None:
    pool = Driver(budget=None, machine=40)
    model = pool.model("a", 60)
    for _ in range(3):
        pool.ask(model)
    pool.decide()
    assert names(pool.decide(SETTLE_SECONDS + 0.1)) == [("Refuse", "a")] * 3


def test_an_evicted_model_counts_until_its_memory_is_back() -> None:
    pool = Driver(budget=None, machine=60)
    first, second = pool.model("a", 60), pool.model("b", 60)
    pool.use(first)
    pool.machine = 0
    ticket = pool.ask(second)
    assert names(pool.decide()) == [("Evict", "a")]
    assert pool.decide() == []
    assert ticket.reason == "waiting for the memory of a, which is being evicted"
    pool.scheduler.gone(first)
    pool.machine = 60
    assert names(pool.decide()) == [("Load", "b")]
    assert first.state is ModelState.ABSENT
