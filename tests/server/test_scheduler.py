"""The scheduler: order of admission, and memory of the admitted requests."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner_server.engine.generation_request import GenerationRequest
from runner_server.engine.request import RequestStatus
from runner_server.engine.scheduler import Scheduler
from runner_server.engine.types import CompletionSpec, Token
from support.fakes import TOKEN_BYTES, ByteCodec, FakeBackend, FakeModel, model_info

PLENTY = 1 << 30


def _model(*, parallel: int = 4, budget_tokens: int = PLENTY) -> FakeModel:
    info = replace(model_info(), parallel=parallel, kv_budget_bytes=budget_tokens * TOKEN_BYTES)
    return FakeModel(FakeBackend(), info)


def _request(length: int = 10) -> GenerationRequest:
    """Return a request of ``length`` tokens, prompt and answer together."""
    return GenerationRequest(CompletionSpec((1,), length - 1), ByteCodec(), frozenset())


def _waiting(scheduler: Scheduler, *lengths: int) -> list[GenerationRequest]:
    completions = [_request(length) for length in lengths]
    for completion in completions:
        scheduler.add(completion)
    return completions


def _preempt(request: GenerationRequest) -> None:
    """Preempt a request, after a first token if necessary."""
    if request.status is RequestStatus.PREFILLING:
        request.on_token(Token(request.id, 97))
    request.preempt()


def _scheduler(model: FakeModel) -> Scheduler:
    scheduler = Scheduler()
    scheduler.start_batch(model, model.new_executor())
    return scheduler


def _admit_all(scheduler: Scheduler, model: FakeModel) -> list[GenerationRequest]:
    """Admit and resume what fits; return the requests that have become running."""
    before = scheduler.running
    scheduler.admit(model)
    return [one for one in scheduler.running if one not in before]


def test_requests_are_admitted_in_order_while_there_are_slots() -> None:
    model = _model(parallel=3)
    scheduler = _scheduler(model)
    completions = _waiting(scheduler, *[10] * 5)
    assert _admit_all(scheduler, model) == completions[:3]
    assert not scheduler.has_next(model)
    assert scheduler.remove(completions[1])
    assert scheduler.has_next(model)
    assert _admit_all(scheduler, model) == [completions[3]]
    assert list(scheduler.waiting) == completions[4:]


def test_every_row_counts_as_long_as_the_longest() -> None:
    """Reserve twice sixty for rows of sixty and ten tokens side by side."""
    for budget, fitting in ((120, 2), (119, 1)):
        model = _model(budget_tokens=budget)
        scheduler = _scheduler(model)
        completions = _waiting(scheduler, 60, 10)
        assert _admit_all(scheduler, model) == completions[:fitting]


def test_no_request_overtakes_one_that_does_not_fit() -> None:
    model = _model(budget_tokens=100)
    scheduler = _scheduler(model)
    first, large, small = _waiting(scheduler, 50, 60, 10)
    assert _admit_all(scheduler, model) == [first]
    scheduler.remove(first)
    assert _admit_all(scheduler, model) == [large]
    scheduler.remove(large)
    assert _admit_all(scheduler, model) == [small]


def test_a_preempted_request_frees_its_slot_and_keeps_its_memory() -> None:
    """Count a preempted request by the present length, and by the longest outcome on return."""
    model = _model(parallel=2, budget_tokens=100)
    scheduler = _scheduler(model)
    preempted, fitting, large = _waiting(scheduler, 60, 95, 96)
    scheduler.admit(model)
    for _ in range(4):
        preempted.on_token(Token(preempted.id, 97))
    _preempt(preempted)
    assert preempted.length == 5
    assert _admit_all(scheduler, model) == [fitting]
    scheduler.remove(fitting)
    assert not scheduler.has_next(model)
    scheduler.remove(large)
    (small,) = _waiting(scheduler, 50)
    assert _admit_all(scheduler, model) == [small]
    scheduler.mark_resumable(preempted.id)
    assert not scheduler.has_next(model)
    scheduler.remove(small)
    assert _admit_all(scheduler, model) == [preempted]


def test_resumable_requests_go_before_waiting_ones() -> None:
    model = _model(parallel=1)
    scheduler = _scheduler(model)
    first, second, third = _waiting(scheduler, 10, 10, 10)
    scheduler.admit(model)
    _preempt(first)
    scheduler.admit(model)
    _preempt(second)
    scheduler.mark_resumable(second.id)
    scheduler.mark_resumable(first.id)
    for expected in (second, first, third):
        assert _admit_all(scheduler, model) == [expected]
        assert not _admit_all(scheduler, model)
        scheduler.remove(expected)


def test_a_resumable_request_needs_room_beside_running_ones() -> None:
    model = _model(parallel=2, budget_tokens=110)
    scheduler = _scheduler(model)
    preempted, small = _waiting(scheduler, 60, 40)
    scheduler.admit(model)
    _preempt(preempted)
    assert _admit_all(scheduler, model) == [small]
    scheduler.mark_resumable(preempted.id)
    # Side by side they would take twice sixty.
    assert not scheduler.has_next(model)
    scheduler.remove(small)
    assert _admit_all(scheduler, model) == [preempted]


def test_a_request_can_always_resume_into_an_empty_batch() -> None:
    """Resume into an empty batch: the caches are held already, and no other row can make room."""
    model = _model(budget_tokens=100)
    scheduler = _scheduler(model)
    one, other = _waiting(scheduler, 50, 50)
    _admit_all(scheduler, model)
    _preempt(one)
    _preempt(other)
    smaller = _model(budget_tokens=60)
    scheduler.mark_resumable(one.id)
    assert _admit_all(scheduler, smaller) == [one]


def test_only_a_preempted_request_becomes_resumable() -> None:
    model = _model()
    scheduler = _scheduler(model)
    (completion,) = _waiting(scheduler, 10)
    scheduler.mark_resumable(completion.id)
    assert not scheduler.resumable
    scheduler.admit(model)
    scheduler.mark_resumable(completion.id)
    assert scheduler.running == [completion]
    _preempt(completion)
    scheduler.remove(completion)
    completion.cancel()
    scheduler.mark_resumable(completion.id)
    assert not scheduler.resumable


@pytest.mark.parametrize("where", ["waiting", "running", "preempted", "resumable", "nowhere"])
def test_a_request_is_removed_in_any_status(where: str) -> None:
    model = _model()
    scheduler = _scheduler(model)
    others = _waiting(scheduler, 10, 10)
    _admit_all(scheduler, model)
    completion = _request()
    if where != "nowhere":
        scheduler.waiting.append(completion)
    if where in ("running", "preempted", "resumable"):
        scheduler.admit(model)
    if where in ("preempted", "resumable"):
        _preempt(completion)
    if where == "resumable":
        scheduler.mark_resumable(completion.id)
    # ``remove`` returns whether the request held memory.
    holds = where in ("running", "preempted", "resumable")
    assert scheduler.remove(completion) is holds
    assert not scheduler.remove(completion)
    assert list(scheduler.admitted.values()) == others
    assert not scheduler.waiting


def test_a_cleared_scheduler_is_empty() -> None:
    model = _model(parallel=3)
    scheduler = _scheduler(model)
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
def test_the_memory_of_admitted_requests_fits(
    operations: list[tuple[str, int]], parallel: int, budget: int
) -> None:
    model = _model(parallel=parallel, budget_tokens=budget)
    scheduler = _scheduler(model)
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
    preempted = [one.length for one in scheduler.preempted]
    need = len(running) * max(running, default=0) + sum(preempted)
    # A lone resumed request may exceed the budget: slow readers of others must not block it.
    alone = running[0] if len(running) == 1 else 0
    assert need * TOKEN_BYTES <= model.info.kv_budget_bytes + alone * TOKEN_BYTES
    assert len(running) <= model.info.parallel
    # The queue never waits without a reason: with none admitted there is room.
    assert scheduler.admitted or not scheduler.waiting
    assert scheduler.running or not scheduler.resumable
