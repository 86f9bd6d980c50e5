"""A machine with a virtual clock on which a ``PoolScheduler`` is driven through random events.

Loads take time, reserve memory and may be refused, runners die, other programs take memory, callers
lose patience, people pin and evict, and spare processes start, die and are taken. Every step checks
the promises of the pool; ``run`` raises ``AssertionError`` at the first one that is broken.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from runner_client.pool.scheduling.scheduler import LOOK_SECONDS, PoolScheduler
from runner_client.pool.scheduling.settings import ModelSettings, PoolSettings
from runner_client.pool.scheduling.states import (
    Action,
    EndSpare,
    Evict,
    Grant,
    Lease,
    Load,
    ModelState,
    Need,
    PooledModel,
    Refuse,
    Spare,
    StartSpare,
    Ticket,
)
from support.spare_simulation import SimulatedSpares

MAX_LOAD_SECONDS = 8.0
MAX_LEASE_SECONDS = 6.0
MAX_RETURN_SECONDS = 1.0
HORIZON_SECONDS = 200.0
SPARE_BYTES = 7


@dataclass(frozen=True)
class Scenario:
    """What may happen in a simulation.

    Attributes:
        model_count: Number of models.
        arrivals_per_second: Mean rate of requests.
        is_calm: No deaths, failures, pins, pressure or priorities, so that waits have a bound.
        budget: The budget of the pool; None for the machine alone.
        machine: Memory of the machine that runners can have.
        spares: Number of spare processes to keep.
    """

    model_count: int = 5
    arrivals_per_second: float = 0.5
    is_calm: bool = False
    budget: int | None = 100
    machine: int = 130
    spares: int = 0


@dataclass
class Request:
    """A caller's request, from arrival to the end of the lease."""

    ticket: Ticket
    life: int
    outcome: str = "waiting"


@dataclass
class Simulation:
    """One run of a scenario.

    Attributes:
        counts: Events by name.
        longest_wait: The longest time from arrival to grant, in seconds.
    """

    scenario: Scenario
    seed: int
    counts: Counter[str] = field(default_factory=Counter)
    longest_wait: float = 0.0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)  # noqa: S311 - chooses events
        self.settings = PoolSettings(
            budget_bytes=self.scenario.budget,
            min_residence_seconds=self.random.choice([0.0, 2.0]),
            max_wait_seconds=self.random.choice([0.0, 5.0, 15.0]),
            spare_processes=self.scenario.spares,
        )
        self.scheduler = PoolScheduler(self.settings, SPARE_BYTES)
        self.spares = SimulatedSpares(self)
        self.now = 0.0
        self.outside = 0
        self.actual: dict[str, int] = {}
        self.reserved: dict[str, int] = {}
        self.requests: list[Request] = []
        self._numbers = itertools.count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._alarm = math.inf
        self._names = [f"m{i}" for i in range(self.scenario.model_count)]
        self._models = [self._new_model(name) for name in self._names]
        self._served: set[tuple[str, int]] = set()
        self._leases: Counter[tuple[str, int]] = Counter()

    def _new_model(self, name: str) -> PooledModel:
        total = self.random.randint(10, 90)
        calm = self.scenario.is_calm
        settings = ModelSettings(
            priority=0 if calm else self.random.choice([0, 0, 1, -1]),
            keep_alive_seconds=self.random.choice([None, 3.0, 30.0]),
            pinned=not calm and self.random.random() < 0.1,
        )
        need = Need(total, self.random.randint(int(total * 0.8), total))
        return self.scheduler.model(name, settings, need)

    def run(self) -> Counter[str]:
        """Run to the end, and return the events by name."""
        self._arrive()
        if not self.scenario.is_calm:
            self.after(self.random.expovariate(0.1), self._disturb)
        while self._events or (self._alarm < math.inf and not self._is_over):
            if not self._events or self._alarm < self._events[0][0]:
                self.now = self._alarm
            else:
                self.now, _, event = heapq.heappop(self._events)
                event()
            self._decide()
            self._check()
            assert self.now < 20 * HORIZON_SECONDS, "requests never end"
        waiting = [each for each in self.requests if each.outcome == "waiting"]
        assert not waiting, f"{len(waiting)} requests never end: {waiting[0].ticket.reason}"
        return self.counts

    @property
    def _is_over(self) -> bool:
        """Whether the only thing that may still happen is the start of a spare process."""
        return self.now > 2 * HORIZON_SECONDS and not self.scheduler.waiting()

    def after(self, seconds: float, event: Callable[[], None]) -> None:
        """Let an event happen in this many seconds."""
        heapq.heappush(self._events, (self.now + seconds, next(self._numbers), event))

    def _arrive(self) -> None:
        model = self.random.choice(self._models)
        ticket = self.scheduler.request(
            self.now,
            model,
            may_evict=self.random.random() < 0.9,
            is_lease=self.random.random() < 0.95,
        )
        request = Request(ticket, model.life)
        self.requests.append(request)
        self.counts["request"] += 1
        if self.random.random() < 0.1:
            self.after(self.random.uniform(0.0, 20.0), lambda: self._lose_patience(request))
        if self.now < HORIZON_SECONDS:
            self.after(self.random.expovariate(self.scenario.arrivals_per_second), self._arrive)

    def _lose_patience(self, request: Request) -> None:
        if request.outcome == "waiting":
            self.scheduler.cancel(request.ticket)
            self._end(request, "cancelled")

    def _end(self, request: Request, outcome: str) -> None:
        request.outcome = outcome
        self.counts[outcome] += 1

    def _disturb(self) -> None:
        """Let something happen that the pool did not ask for."""
        events = [self._die, self._press, self._pin, self._evict_by_hand]
        if self.scenario.spares:
            events += [self.spares.die, self.spares.drop]
        self.random.choice(events)()
        if self.now < HORIZON_SECONDS:
            self.after(self.random.expovariate(0.2), self._disturb)
        else:
            self.outside = 0
            for model in self._models:
                model.is_pinned = False

    def _die(self) -> None:
        if ready := [each for each in self._models if each.state is ModelState.READY]:
            self._vanish(self.random.choice(ready))
            self.counts["death"] += 1

    def _press(self) -> None:
        self.outside = self.random.choice([0, 0, 20, 50, 100])
        self.counts["pressure"] += 1

    def _pin(self) -> None:
        model = self.random.choice(self._models)
        model.is_pinned = not model.is_pinned
        self.counts["pin"] += 1

    def _evict_by_hand(self) -> None:
        if idle := [each for each in self._models if each.is_idle]:
            model = self.random.choice(idle)
            self.scheduler.evict(model)
            self._stop(model)
            self.counts["manual eviction"] += 1

    def _vanish(self, model: PooledModel) -> None:
        self.actual.pop(model.name, None)
        self.reserved.pop(model.name, None)
        self.spares.give_back(model)
        self.scheduler.gone(model)

    def unreserved(self) -> int:
        """Return the memory that the machine can give."""
        reserved = sum(self.reserved.values()) + self.spares.reserved_bytes
        return self.scenario.machine - self.outside - reserved

    def available(self) -> int:
        """Return the memory that the machine can give, less that of starts not yet admitted."""
        begun = sum(
            each.need.total_bytes - self.spares.taken_bytes(each)
            for each in self._models
            if each.state is ModelState.LOADING and each.name not in self.reserved
        )
        return self.unreserved() - begun - self.spares.begun_bytes

    def _decide(self) -> None:
        available = self.available()
        actions = self.scheduler.decide(self.now, available, self.spares.reserve)
        for action in actions:
            self._carry_out(action)
        started = sum(isinstance(action, StartSpare) for action in actions)
        assert not started or started * SPARE_BYTES <= available - self.spares.reserve
        self._alarm = self.scheduler.next_decision(self.now)
        assert self._alarm > self.now

    def _carry_out(self, action: Action) -> None:
        match action:
            case Grant(ticket, lease):
                self._granted(self._request(ticket), lease)
            case Refuse(ticket, required_bytes, available_bytes, _):
                assert required_bytes > available_bytes or not ticket.may_evict
                self._check_refusal(ticket)
                self._end(self._request(ticket), "refused")
            case Load(model, spare):
                self.counts["load"] += 1
                if spare is not None:
                    self.spares.take(model, spare)
                life = model.life
                self.after(self.random.uniform(0.0, 0.5), lambda: self._admit(model, life))
            case Evict(model, reason):
                self._check_eviction(model, reason)
                self._stop(model)
            case StartSpare(spare):
                self.spares.start(spare)
            case EndSpare(spare, _):
                self._check_room_is_short(spare)
                self.spares.stop(spare)

    def _request(self, ticket: Ticket) -> Request:
        return next(each for each in self.requests if each.ticket is ticket)

    def _granted(self, request: Request, lease: Lease | None) -> None:
        model = request.ticket.model
        assert model.state is ModelState.READY
        self._served.add((model.name, model.life))
        wait = self.now - request.ticket.arrived
        self.longest_wait = max(self.longest_wait, wait)
        if self.scenario.is_calm:
            assert wait <= self._bound(), f"waited for {wait:.1f} s"
        self._end(request, "granted")
        if lease is not None:
            self._leases[model.name, model.life] += 1
            seconds = self.random.uniform(0.0, MAX_LEASE_SECONDS)
            self.after(seconds, lambda: self._release(lease))

    def _release(self, lease: Lease) -> None:
        self._leases[lease.model.name, lease.life] -= 1
        self.scheduler.release(self.now, lease)

    def _bound(self) -> float:
        """Return the longest wait: a turn of every other model, each after the full wait."""
        residence = max(self.settings.min_residence_seconds, MAX_LOAD_SECONDS)
        turn = self.settings.max_wait_seconds + residence + MAX_LEASE_SECONDS
        turn += MAX_RETURN_SECONDS + MAX_LOAD_SECONDS + 2 * LOOK_SECONDS
        return self.scenario.model_count * turn

    def _admit(self, model: PooledModel, life: int) -> None:
        """Reserve memory for a load as the gate does, or refuse it."""
        if model.state is not ModelState.LOADING or model.life != life:
            return
        available = self.unreserved() + self.spares.taken_bytes(model)
        self.spares.give_back(model)
        if model.need.required_bytes > available:
            self.counts["load refused by the machine"] += 1
            self.scheduler.gone(model)
            return
        self.reserved[model.name] = min(model.need.total_bytes, available)
        self.actual[model.name] = int(self.reserved[model.name] * self.random.uniform(0.7, 1.0))
        seconds = self.random.uniform(0.1, MAX_LOAD_SECONDS - 0.5)
        self.after(seconds, lambda: self._loaded(model, life))

    def _loaded(self, model: PooledModel, life: int) -> None:
        if model.state is not ModelState.LOADING or model.life != life:
            return
        if not self.scenario.is_calm and self.random.random() < 0.05:
            self.counts["load failed"] += 1
            self._vanish(model)
            for ticket in self.scheduler.waiting(model):
                self.scheduler.cancel(ticket)
                self._end(self._request(ticket), "failed")
            return
        self.scheduler.loaded(self.now, model, self.reserved[model.name])

    def _stop(self, model: PooledModel) -> None:
        self.counts["eviction"] += 1
        life = model.life

        def gone() -> None:
            if model.state is ModelState.EVICTING and model.life == life:
                self._vanish(model)

        self.after(self.random.uniform(0.0, MAX_RETURN_SECONDS), gone)

    def _check_eviction(self, model: PooledModel, reason: str) -> None:
        assert not model.is_pinned or "cancelled" in reason, f"{model.name} is pinned"
        assert not self._leases[model.name, model.life], f"{model.name} is in use"
        if reason.startswith("to make room"):
            self.counts["eviction to make room"] += 1
            self._check_room_is_short(model)
            stay = max(self.settings.min_residence_seconds, model.ready_at - model.began_at)
            assert self.now >= model.ready_at + stay, "evicted too early"
        if "cancelled" not in reason and (model.name, model.life) not in self._served:
            wanted = [
                each
                for each in self.requests
                if each.ticket.model is model and each.outcome == "waiting"
            ]
            early = [each for each in wanted if each.life < model.life]
            assert not early, f"{model.name} goes before its own first request"

    def _check_room_is_short(self, victim: PooledModel | Spare) -> None:
        """Check that the first request would not fit without the end of ``victim``.

        All spare processes end before any model, except for the one that the load takes.
        """
        waiting = self.scheduler.waiting()
        need = next(each.model.need for each in waiting if each.model.state is ModelState.ABSENT)
        coming = sum(
            each.held_bytes
            for each in self._models
            if each.state is ModelState.EVICTING and each is not victim
        )
        spares = self.scheduler.spares
        if isinstance(victim, Spare):
            coming += spares.ending_bytes - victim.held_bytes + spares.next_bytes
        else:
            coming += spares.held_bytes
        budget = math.inf if self.settings.budget_bytes is None else self.settings.budget_bytes
        in_budget = need.total_bytes <= budget - self.scheduler.held_bytes + coming
        in_machine = need.required_bytes <= self.available() + coming
        assert not (in_budget and in_machine), f"{victim} goes for nothing"

    def _check_refusal(self, ticket: Ticket) -> None:
        if not ticket.may_evict:
            self._check_refused_eviction(ticket)
            return
        self.counts["refused for good"] += 1
        kept = sum(each.held_bytes for each in self._models if each.is_pinned)
        budget = math.inf if self.settings.budget_bytes is None else self.settings.budget_bytes
        machine = self.scenario.machine - self.outside
        need = ticket.model.need
        assert need.total_bytes > budget - kept or need.required_bytes > machine - kept

    def _check_refused_eviction(self, ticket: Ticket) -> None:
        """Check that a model, not only spare processes, would have to go, or that others wait."""
        waiting = [each for each in self.scheduler.waiting() if each.model is not ticket.model]
        if any(each.model.state is ModelState.ABSENT for each in waiting):
            return
        held = self.scheduler.held_bytes - self.scheduler.spares.held_bytes
        budget = math.inf if self.settings.budget_bytes is None else self.settings.budget_bytes
        need = ticket.model.need
        in_machine = need.required_bytes <= self.available() + self.spares.untaken_bytes
        assert not (in_machine and need.total_bytes <= budget - held), "refused for nothing"

    def _check(self) -> None:
        held = self.scheduler.held_bytes
        if self.scenario.budget is not None:
            assert held <= self.scenario.budget
            actual = sum(self.actual.values()) + self.spares.reserved_bytes
            assert actual <= self.scenario.budget
        for model in self._models:
            assert self.actual.get(model.name, 0) <= model.held_bytes
            assert model.leases >= 0
            if model.state is ModelState.EVICTING:
                assert model.leases == 0
