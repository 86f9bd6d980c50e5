"""Priority among waiting completions, with ageing, by a simulated clock and over the wire."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from functools import partial

import pytest

from mlxrunner.v1 import runner_pb2 as pb
from runner_server.engine.embedding.request import AnyRequest
from runner_server.engine.generation_request import GenerationRequest
from runner_server.engine.scheduler import SECONDS_PER_LEVEL, Scheduler, queue_position
from runner_server.engine.types import CompletionSpec
from support.fakes import ByteCodec, FakeBackend, FakeModel, model_info
from support.harness import CompletionCall, Server, eventually, failure


@dataclass
class Machine:
    """A scheduler with one slot, in simulated time.

    Attributes:
        now: Seconds since the start.
        served: Requests in the order of admission, each with the time it waited.
    """

    service_seconds: float = 1.0
    now: float = 0.0
    served: list[tuple[GenerationRequest, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model = FakeModel(
            FakeBackend(), replace(model_info(), parallel=1, kv_budget_bytes=1 << 30)
        )
        self.scheduler = Scheduler()
        self.scheduler.start_batch(self.model, self.model.new_executor())

    def add(self, priority: int = 0) -> GenerationRequest:
        """Queue a request that arrives now."""
        spec = CompletionSpec((1,), 1, priority=priority)
        request = GenerationRequest(spec, ByteCodec(), frozenset())
        request.submitted_at = self.now
        self.scheduler.add(request)
        return request

    def serve(self) -> GenerationRequest:
        """Admit the next request, and let its service take its time."""
        (request,) = self.scheduler.admit(self.model)
        assert isinstance(request, GenerationRequest)
        self.served.append((request, self.now - request.submitted_at))
        self.scheduler.remove(request)
        self.now += self.service_seconds
        return request


def test_higher_goes_first_and_equal_ones_in_order_of_arrival() -> None:
    machine = Machine()
    requests = [machine.add(priority) for priority in (0, 5, -5, 5, 0, 100, -100, 0)]
    order = [requests.index(machine.serve()) for _ in requests]
    assert order == [5, 1, 3, 0, 4, 7, 2, 6]


@pytest.mark.parametrize(("levels", "earlier", "is_first"), [(10, 9.5, True), (10, 10.5, False)])
def test_a_second_of_waiting_counts_like_a_level(
    levels: int, earlier: float, is_first: bool
) -> None:
    machine = Machine()
    low = machine.add(0)
    machine.now += earlier * SECONDS_PER_LEVEL
    high = machine.add(levels)
    assert machine.serve() is (high if is_first else low)


def test_a_low_priority_does_not_starve_under_higher_ones() -> None:
    """Let higher requests arrive as fast as the machine serves them."""
    machine = Machine()
    backlog = [machine.add(20) for _ in range(5)]
    low = machine.add(0)
    while machine.serve() is not low:
        machine.add(20)
    waited = machine.served[-1][1]
    # Until 20 s have passed, every arrival overtakes it; those before it stay before it.
    assert 20 <= waited <= 20 + len(backlog) + 1


def test_the_order_is_that_of_aged_priorities_at_any_time() -> None:
    """Compare with the definition: priority plus levels gained by waiting, computed anew."""
    draw = random.Random(7)  # noqa: S311 - a seeded schedule
    machine = Machine(service_seconds=0.7)
    waiting: list[GenerationRequest] = []
    for _ in range(300):
        for _ in range(draw.randrange(3)):
            waiting.append(machine.add(draw.randint(-100, 100)))
            machine.now += draw.random()
        if not waiting:
            continue

        def aged(request: GenerationRequest) -> float:
            waited = machine.now - request.submitted_at
            return request.spec.priority + waited / SECONDS_PER_LEVEL

        expected = max(waiting, key=aged)
        assert machine.serve() is expected
        waiting.remove(expected)


def test_a_higher_request_that_does_not_fit_is_not_overtaken() -> None:
    machine = Machine()
    machine.model = FakeModel(FakeBackend(), replace(model_info(), parallel=1, kv_budget_bytes=0))
    machine.add(5)
    machine.add(0)
    assert not machine.scheduler.has_next(machine.model)
    assert machine.scheduler.admit(machine.model) == []


def test_a_removed_request_leaves_the_order_intact() -> None:
    machine = Machine()
    first, second, third = machine.add(2), machine.add(1), machine.add(0)
    assert not machine.scheduler.remove(second)
    assert [machine.serve(), machine.serve()] == [first, third]


def test_an_arrival_does_not_sort_the_queue_again(monkeypatch: pytest.MonkeyPatch) -> None:
    positions: list[float] = []

    def counting(request: GenerationRequest) -> float:
        positions.append(queue_position(request))
        return positions[-1]

    monkeypatch.setattr("runner_server.engine.scheduler.queue_position", counting)
    machine, count = Machine(), 4000
    for i in range(count):
        machine.add(i * 7919 % 201 - 100)
    assert len(positions) < 20 * count
    found = [queue_position(request) for request in machine.scheduler.waiting]
    assert found == sorted(found)


def start(server: Server, prompt: str, priority: int) -> CompletionCall:
    options = pb.CompletionOptions(num_predict=1)
    request = pb.CompletionRequest(prompt=prompt, priority=priority, options=options)
    return server.stub.Completion(request, timeout=20)


async def test_waiting_completions_are_served_by_priority(server: Server) -> None:
    await server.load(parallel=1)
    server.backend.step_gate.shut()
    calls = [server.start("running", num_predict=3)]
    await server.thread(server.backend.step_gate.wait_arrival)
    priorities = {"low": -5, "usual": 0, "high": 100, "mid": 40}
    for name, priority in priorities.items():
        calls.append(start(server, name, priority))
        await eventually(partial(_has_requests, server, len(calls)))
    requests = dict(zip(priorities, server.view.requests[1:], strict=True))
    server.backend.step_gate.open()
    for call in calls:
        assert [message async for message in call][-1].done
    assert sorted(requests, key=lambda name: _admitted_at(requests[name])) == [
        *("high", "mid", "usual", "low")
    ]


def _admitted_at(request: AnyRequest) -> float:
    return request.submitted_at + request.stats().queue_seconds


def _has_requests(server: Server, count: int) -> bool:
    return server.view.request_count == count


@pytest.mark.parametrize("priority", [-101, 101, 2**31 - 1, -(2**31)])
async def test_a_priority_out_of_range_is_refused(loaded: Server, priority: int) -> None:
    problem = await failure(start(loaded, "x", priority))
    assert (problem.reason, set(problem.violations)) == ("INVALID_FIELD", {"priority"})


@pytest.mark.parametrize("priority", [-100, 0, 100])
async def test_a_priority_in_range_is_accepted(loaded: Server, priority: int) -> None:
    assert [message async for message in start(loaded, "x", priority)][-1].done
