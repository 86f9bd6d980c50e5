"""Who is seated next, and what must fit."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner_server.engine.generation_request import GenerationRequest
from runner_server.engine.scheduler import Scheduler
from runner_server.engine.types import CompletionSpec, Token
from support.fakes import TOKEN_BYTES, ByteCodec, FakeBackend, FakeModel, model_info

PLENTY = 1 << 30


def _model(*, parallel: int = 4, budget_tokens: int = PLENTY) -> FakeModel:
    info = replace(model_info(), parallel=parallel, kv_budget_bytes=budget_tokens * TOKEN_BYTES)
    return FakeModel(FakeBackend(), info)


def _completion(length: int = 10) -> GenerationRequest:
    """One whose prompt and answer have so many tokens together."""
    return GenerationRequest(CompletionSpec((1,), length - 1), ByteCodec(), frozenset())


def _waiting(seats: Scheduler, *lengths: int) -> list[GenerationRequest]:
    completions = [_completion(length) for length in lengths]
    seats.waiting.extend(completions)
    return completions


def _seat_all(seats: Scheduler, model: FakeModel) -> list[GenerationRequest]:
    seated = []
    while completion := seats.next(model):
        seated.append(completion)
    return seated


def test_in_order_as_many_as_there_are_places() -> None:
    seats, model = Scheduler(), _model(parallel=3)
    completions = _waiting(seats, *[10] * 5)
    assert _seat_all(seats, model) == completions[:3]
    assert not seats.has_next(model)
    assert seats.remove(completions[1].id) is completions[1]
    assert seats.has_next(model)
    assert _seat_all(seats, model) == [completions[3]]
    assert list(seats.waiting) == completions[4:]


def test_a_batch_is_as_wide_as_its_longest_row() -> None:
    """Sixty and ten tokens side by side take twice sixty."""
    for budget, fitting in ((120, 2), (119, 1)):
        seats, model = Scheduler(), _model(budget_tokens=budget)
        completions = _waiting(seats, 60, 10)
        assert _seat_all(seats, model) == completions[:fitting]


def test_nobody_overtakes_one_that_does_not_fit() -> None:
    seats, model = Scheduler(), _model(budget_tokens=100)
    first, large, small = _waiting(seats, 50, 60, 10)
    assert _seat_all(seats, model) == [first]
    seats.remove(first.id)
    assert _seat_all(seats, model) == [large]
    seats.remove(large.id)
    assert _seat_all(seats, model) == [small]


def test_one_that_is_set_aside_gives_its_place_and_keeps_what_it_holds() -> None:
    """It does not grow meanwhile; what it may come to need counts again when it returns."""
    seats, model = Scheduler(), _model(parallel=2, budget_tokens=100)
    aside, fitting, large = _waiting(seats, 60, 95, 96)
    seats.next(model)
    for _ in range(4):
        aside.on_token(Token(aside.id, 97))
    seats.pause(aside)
    assert aside.length == 5
    assert _seat_all(seats, model) == [fitting]
    seats.remove(fitting.id)
    assert not seats.has_next(model)
    seats.remove(large.id)
    (small,) = _waiting(seats, 50)
    assert _seat_all(seats, model) == [small]
    seats.read_on(aside.id)
    assert not seats.has_next(model)
    seats.remove(small.id)
    assert _seat_all(seats, model) == [aside]


def test_one_that_returns_goes_before_those_that_wait() -> None:
    seats, model = Scheduler(), _model(parallel=1)
    first, second, third = _waiting(seats, 10, 10, 10)
    seats.next(model)
    seats.pause(first)
    seats.next(model)
    seats.pause(second)
    seats.read_on(second.id)
    seats.read_on(first.id)
    for expected in (second, first, third):
        assert seats.next(model) is expected
        assert seats.next(model) is None
        seats.remove(expected.id)


def test_one_that_returns_needs_room_beside_those_that_run() -> None:
    seats, model = Scheduler(), _model(parallel=2, budget_tokens=110)
    aside, small = _waiting(seats, 60, 40)
    seats.next(model)
    seats.pause(aside)
    assert seats.next(model) is small
    seats.read_on(aside.id)
    # Side by side they would take twice sixty.
    assert not seats.has_next(model)
    seats.remove(small.id)
    assert seats.next(model) is aside


def test_one_that_returns_to_an_empty_batch_always_may() -> None:
    """It holds its memory already; and nobody else could make room for it."""
    seats, model = Scheduler(), _model(budget_tokens=100)
    one, other = _waiting(seats, 50, 50)
    _seat_all(seats, model)
    seats.pause(one)
    seats.pause(other)
    smaller = _model(budget_tokens=60)
    seats.read_on(one.id)
    assert seats.next(smaller) is one


def test_reading_on_after_the_end_is_nothing() -> None:
    seats, model = Scheduler(), _model()
    (completion,) = _waiting(seats, 10)
    seats.read_on(completion.id)
    assert not seats.returning
    seats.next(model)
    seats.read_on(completion.id)
    assert seats.running == {completion.id: completion}
    seats.pause(completion)
    seats.remove(completion.id)
    seats.read_on(completion.id)
    assert not seats.begun


@pytest.mark.parametrize("where", ["waiting", "running", "paused", "returning", "nowhere"])
def test_one_is_taken_out_wherever_it_is(where: str) -> None:
    seats, model = Scheduler(), _model()
    others = _waiting(seats, 10, 10)
    _seat_all(seats, model)
    completion = _completion()
    if where != "nowhere":
        seats.waiting.append(completion)
    if where in ("running", "paused", "returning"):
        seats.next(model)
    if where in ("paused", "returning"):
        seats.pause(completion)
    if where == "returning":
        seats.read_on(completion.id)
    # It is told whether there is something to be freed.
    holds = where in ("running", "paused", "returning")
    assert seats.remove(completion.id) is (completion if holds else None)
    assert seats.remove(completion.id) is None
    assert seats.begun == others
    assert not seats.waiting


def test_cleared_it_has_none() -> None:
    seats, model = Scheduler(), _model(parallel=3)
    completions = _waiting(seats, *[10] * 5)
    _seat_all(seats, model)
    seats.pause(completions[0])
    seats.pause(completions[1])
    seats.read_on(completions[1].id)
    assert len(seats.begun) == 3
    seats.clear()
    assert not seats.begun
    assert not seats.has_next(model)


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["come", "end", "pause", "read on"]), st.integers(1, 40)),
    max_size=40,
)


@given(operations=OPERATIONS, parallel=st.integers(1, 3), budget=st.integers(40, 120))
@settings(max_examples=200, deadline=None)
def test_the_memory_of_all_that_have_begun_fits(
    operations: list[tuple[str, int]], parallel: int, budget: int
) -> None:
    seats, model = Scheduler(), _model(parallel=parallel, budget_tokens=budget)
    came: list[GenerationRequest] = []
    begun: list[GenerationRequest] = []
    for kind, number in operations:
        running, paused = list(seats.running.values()), list(seats.paused.values())
        if kind == "come":
            came += _waiting(seats, number)
        elif kind == "end" and running:
            seats.remove(running[number % len(running)].id)
        elif kind == "pause" and running:
            seats.pause(running[number % len(running)])
        elif kind == "read on" and paused:
            seats.read_on(paused[number % len(paused)].id)
        begun += [one for one in _seat_all(seats, model) if one not in begun]
        _check(seats, model)
    assert begun == came[: len(begun)]


def _check(seats: Scheduler, model: FakeModel) -> None:
    running = [one.max_length for one in seats.running.values()]
    aside = [one.length for one in seats.begun if one.id not in seats.running]
    need = len(running) * max(running, default=0) + sum(aside)
    # One that returns when nobody runs may: the readers of the others must not hold it up.
    alone = running[0] if len(running) == 1 else 0
    assert need * TOKEN_BYTES <= model.info.kv_budget_bytes + alone * TOKEN_BYTES
    assert len(running) <= model.info.parallel
    # Nobody waits for nothing: with none that runs or is set aside there is room.
    assert seats.begun or not seats.waiting
    assert seats.running or not seats.returning
