<<<<<<< HEAD:tests/server/test_scheduler.py
"""Who is admitted next, and what must fit."""
=======
"""The scheduler: order of admission, and memory of the admitted requests."""
>>>>>>> 323b394 (Reword the prose of the server tests):tests/server/test_seats.py

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner_server.engine.generation_request import GenerationRequest, RequestStatus
from runner_server.engine.scheduler import Scheduler
from runner_server.engine.types import CompletionSpec, Token
from support.fakes import TOKEN_BYTES, ByteCodec, FakeBackend, FakeModel, model_info

PLENTY = 1 << 30


def _model(*, parallel: int = 4, budget_tokens: int = PLENTY) -> FakeModel:
    info = replace(model_info(), parallel=parallel, kv_budget_bytes=budget_tokens * TOKEN_BYTES)
    return FakeModel(FakeBackend(), info)


def _completion(length: int = 10) -> GenerationRequest:
    """Return a request of ``length`` tokens, prompt and answer together."""
    return GenerationRequest(CompletionSpec((1,), length - 1), ByteCodec(), frozenset())


def _waiting(scheduler: Scheduler, *lengths: int) -> list[GenerationRequest]:
    completions = [_completion(length) for length in lengths]
    scheduler.waiting.extend(completions)
    return completions


def _preempt(request: GenerationRequest) -> None:
    """Preempt a request, after a first token if necessary."""
    if request.status is RequestStatus.PREFILLING:
        request.on_token(Token(request.id, 97))
    request.preempt()


def _admit_all(scheduler: Scheduler, model: FakeModel) -> list[GenerationRequest]:
    admitted = []
    while completion := scheduler.next(model):
        admitted.append(completion)
    return admitted


def test_in_order_as_many_as_there_are_places() -> None:
    scheduler, model = Scheduler(), _model(parallel=3)
    completions = _waiting(scheduler, *[10] * 5)
    assert _admit_all(scheduler, model) == completions[:3]
    assert not scheduler.has_next(model)
    assert scheduler.remove(completions[1])
    assert scheduler.has_next(model)
    assert _admit_all(scheduler, model) == [completions[3]]
    assert list(scheduler.waiting) == completions[4:]


def test_a_batch_is_as_wide_as_its_longest_row() -> None:
    """Reserve twice sixty for rows of sixty and ten tokens side by side."""
    for budget, fitting in ((120, 2), (119, 1)):
        scheduler, model = Scheduler(), _model(budget_tokens=budget)
        completions = _waiting(scheduler, 60, 10)
        assert _admit_all(scheduler, model) == completions[:fitting]


def test_nobody_overtakes_one_that_does_not_fit() -> None:
    scheduler, model = Scheduler(), _model(budget_tokens=100)
    first, large, small = _waiting(scheduler, 50, 60, 10)
    assert _admit_all(scheduler, model) == [first]
    scheduler.remove(first)
    assert _admit_all(scheduler, model) == [large]
    scheduler.remove(large)
    assert _admit_all(scheduler, model) == [small]


def test_one_that_is_set_aside_gives_its_place_and_keeps_what_it_holds() -> None:
    """Count a preempted request by the present length, and by the longest outcome on return."""
    scheduler, model = Scheduler(), _model(parallel=2, budget_tokens=100)
    aside, fitting, large = _waiting(scheduler, 60, 95, 96)
    scheduler.next(model)
    for _ in range(4):
        aside.on_token(Token(aside.id, 97))
    _preempt(aside)
    assert aside.length == 5
    assert _admit_all(scheduler, model) == [fitting]
    scheduler.remove(fitting)
    assert not scheduler.has_next(model)
    scheduler.remove(large)
    (small,) = _waiting(scheduler, 50)
    assert _admit_all(scheduler, model) == [small]
    scheduler.mark_resumable(aside.id)
    assert not scheduler.has_next(model)
    scheduler.remove(small)
    assert _admit_all(scheduler, model) == [aside]


def test_one_that_returns_goes_before_those_that_wait() -> None:
    scheduler, model = Scheduler(), _model(parallel=1)
    first, second, third = _waiting(scheduler, 10, 10, 10)
    scheduler.next(model)
    _preempt(first)
    scheduler.next(model)
    _preempt(second)
    scheduler.mark_resumable(second.id)
    scheduler.mark_resumable(first.id)
    for expected in (second, first, third):
        assert scheduler.next(model) is expected
        assert scheduler.next(model) is None
        scheduler.remove(expected)


def test_one_that_returns_needs_room_beside_those_that_run() -> None:
    scheduler, model = Scheduler(), _model(parallel=2, budget_tokens=110)
    aside, small = _waiting(scheduler, 60, 40)
    scheduler.next(model)
    _preempt(aside)
    assert scheduler.next(model) is small
    scheduler.mark_resumable(aside.id)
    # Side by side they would take twice sixty.
    assert not scheduler.has_next(model)
    scheduler.remove(small)
    assert scheduler.next(model) is aside


def test_one_that_returns_to_an_empty_batch_always_may() -> None:
    """Resume into an empty batch: the caches are held already, and no other row can make room."""
    scheduler, model = Scheduler(), _model(budget_tokens=100)
    one, other = _waiting(scheduler, 50, 50)
    _admit_all(scheduler, model)
    _preempt(one)
    _preempt(other)
    smaller = _model(budget_tokens=60)
    scheduler.mark_resumable(one.id)
    assert scheduler.next(smaller) is one


def test_reading_on_after_the_end_is_nothing() -> None:
    scheduler, model = Scheduler(), _model()
    (completion,) = _waiting(scheduler, 10)
    scheduler.mark_resumable(completion.id)
    assert not scheduler.resumable
    scheduler.next(model)
    scheduler.mark_resumable(completion.id)
    assert scheduler.running == [completion]
    _preempt(completion)
    scheduler.remove(completion)
    scheduler.mark_resumable(completion.id)
    assert not scheduler.resumable


@pytest.mark.parametrize("where", ["waiting", "running", "preempted", "resumable", "nowhere"])
def test_one_is_taken_out_wherever_it_is(where: str) -> None:
    scheduler, model = Scheduler(), _model()
    others = _waiting(scheduler, 10, 10)
    _admit_all(scheduler, model)
    completion = _completion()
    if where != "nowhere":
        scheduler.waiting.append(completion)
    if where in ("running", "preempted", "resumable"):
        scheduler.next(model)
    if where in ("preempted", "resumable"):
        _preempt(completion)
    if where == "resumable":
<<<<<<< HEAD:tests/server/test_scheduler.py
        scheduler.mark_resumable(completion.id)
    # It is told whether there is something to be freed.
=======
        scheduler.mark_resumable(completion)
    # ``remove`` returns whether the request held memory.
>>>>>>> 323b394 (Reword the prose of the server tests):tests/server/test_seats.py
    holds = where in ("running", "preempted", "resumable")
    assert scheduler.remove(completion) is holds
    assert not scheduler.remove(completion)
    assert list(scheduler.admitted.values()) == others
    assert not scheduler.waiting


def test_cleared_it_has_none() -> None:
    scheduler, model = Scheduler(), _model(parallel=3)
    completions = _waiting(scheduler, *[10] * 5)
    _admit_all(scheduler, model)
    _preempt(completions[0])
    _preempt(completions[1])
    scheduler.mark_resumable(completions[1].id)
    assert len(scheduler.admitted) == 3
    scheduler.clear()
    assert not scheduler.admitted
    assert not scheduler.has_next(model)


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["come", "end", "preempt", "resume"]), st.integers(3, 40)),
    max_size=40,
)


@given(operations=OPERATIONS, parallel=st.integers(1, 3), budget=st.integers(40, 120))
@settings(max_examples=200, deadline=None)
def test_the_memory_of_all_that_have_begun_fits(
    operations: list[tuple[str, int]], parallel: int, budget: int
) -> None:
    scheduler, model = Scheduler(), _model(parallel=parallel, budget_tokens=budget)
    came: list[GenerationRequest] = []
    begun: list[GenerationRequest] = []
    for kind, number in operations:
        running, preempted = scheduler.running, scheduler.preempted
        if kind == "come":
            came += _waiting(scheduler, number)
        elif kind == "end" and running:
            scheduler.remove(running[number % len(running)])
        elif kind == "preempt" and running:
            _preempt(running[number % len(running)])
        elif kind == "resume" and preempted:
            scheduler.mark_resumable(preempted[number % len(preempted)].id)
        begun += [one for one in _admit_all(scheduler, model) if one not in begun]
        _check(scheduler, model)
    assert begun == came[: len(begun)]


def _check(scheduler: Scheduler, model: FakeModel) -> None:
    running = [one.max_length for one in scheduler.running]
    aside = [one.length for one in scheduler.preempted]
    need = len(running) * max(running, default=0) + sum(aside)
    # A lone resumed request may exceed the budget: slow readers of others must not block it.
    alone = running[0] if len(running) == 1 else 0
    assert need * TOKEN_BYTES <= model.info.kv_budget_bytes + alone * TOKEN_BYTES
    assert len(running) <= model.info.parallel
    # The queue never waits without a reason: with none admitted there is room.
    assert scheduler.admitted or not scheduler.waiting
    assert scheduler.running or not scheduler.resumable
