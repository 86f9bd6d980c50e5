"""Scheduler of a pool: grants leases, and chooses the models to load and to evict.

Pure: no clock, no process, no measurement. ``AsyncRunnerPool`` reports what happens and carries the
actions out; tests and simulations drive the scheduler with a clock of their own.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

from runner_client.pool.scheduling.spares import Spares
from runner_client.pool.scheduling.states import (
    Action,
    Evict,
    Grant,
    Lease,
    Load,
    ModelState,
    Need,
    PooledModel,
    Refuse,
    Ticket,
)
from runner_client.pool.scheduling.victims import (
    cover,
    described,
    kept_for_others,
    needs_eviction,
    over_budget,
    over_machine,
    rank,
    when,
)
from runner_common.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from runner_client.pool.scheduling.settings import ModelSettings, PoolSettings

SETTLE_SECONDS = 1.0
"""How long memory must be too short, whatever is evicted, before a request is refused.

A measurement may count memory twice while another runner starts or stops."""

LOOK_SECONDS = 1.0
"""Interval between decisions while a request waits for memory, because the free memory of the
machine changes without notice."""


class PoolScheduler:
    """Schedules models within a budget of bytes.

    Rules:

    - Tickets of a loaded model are granted at once. Tickets of other models wait in one queue, in
      order of arrival; priority counts as earlier arrival.
    - The first ticket whose model is absent gets it loaded if its need fits the rest of the budget
      and of the machine's memory. Otherwise idle models are evicted for it, if all of them that may
      go make enough room: those of lower priority first, then least recently used first, and none
      that is not needed. Tickets behind it wait, so that it is not overtaken forever.
    - A model is never evicted while it loads for a ticket, has a lease, is pinned, or has been
      loaded for less than ``min_residence_seconds``, or for less time than its load took, so that
      at most half of the time is spent on loads.
    - A load takes a spare process if there is one. Others are stopped before any model is evicted.
      New ones are started while no model is loaded or evicted, and while tickets wait for memory
      only the one that the next load takes, whose memory is a part of that load's need.
    - A ticket that has waited for ``max_wait_seconds`` makes models in use yield: they get no new
      leases until it is served. So two models under load alternate with long turns, and neither
      waits for more than that time plus the leases that run.

    Args:
        settings: The settings of the pool.
        spare_bytes: Memory counted for a spare process.

    Attributes:
        spares: The spare processes.
    """

    def __init__(self, settings: PoolSettings, spare_bytes: int = 0) -> None:
        self._settings = settings
        self.spares = Spares(settings.spare_processes, spare_bytes)
        self._models: dict[str, PooledModel] = {}
        self._queue: list[Ticket] = []
        self._numbers = itertools.count()

    @property
    def models(self) -> tuple[PooledModel, ...]:
        """Every model that was ever requested."""
        return tuple(self._models.values())

    @property
    def held_bytes(self) -> int:
        """Memory counted for all models and spare processes."""
        return sum(model.held_bytes for model in self._models.values()) + self.spares.held_bytes

    @property
    def kept_bytes(self) -> int:
        """Memory of pinned models, which no other model can have."""
        return sum(each.held_bytes for each in self._models.values() if not _goes_in_the_end(each))

    @property
    def is_short(self) -> bool:
        """Whether a ticket waits for the load of a model, so that a measurement is needed."""
        return any(ticket.model.state is ModelState.ABSENT for ticket in self._queue)

    def fits_next(self, machine_bytes: int) -> bool:
        """Whether a ticket waits for a load, and the machine has the memory for the first one."""
        absent = (each.model for each in self._queue if each.model.state is ModelState.ABSENT)
        model = next(absent, None)
        return model is not None and self._machine_short(model.need, machine_bytes) <= 0

    def wants_spare(self, now: float) -> bool:
        """Whether a spare process is started if the machine has room, which must be measured."""
        if self._in(ModelState.LOADING) or self._in(ModelState.EVICTING):
            return False
        is_due = now >= self.spares.start_time(only_next=self.is_short)
        return is_due and self._budget_rest() >= self.spares.each_bytes

    def _budget_rest(self) -> float:
        budget = self._settings.budget_bytes
        return math.inf if budget is None else budget - self.held_bytes

    def waiting(self, model: PooledModel | None = None) -> tuple[Ticket, ...]:
        """Return the tickets that wait, all or those of one model, first come first."""
        return tuple(each for each in self._queue if model in (None, each.model))

    def model(self, name: str, settings: ModelSettings, need: Need) -> PooledModel:
        """Return a model, registered at its first request; the need of a loaded one stays."""
        model = self._models.get(name)
        if model is None:
            model = PooledModel(name, settings, settings.pinned, need)
            self._models[name] = model
        elif not model.is_held:
            model.need = need
        return model

    def find(self, name: str) -> PooledModel | None:
        """Return a registered model; None if it was never requested."""
        return self._models.get(name)

    def request(
        self, now: float, model: PooledModel, *, may_evict: bool = True, is_lease: bool = True
    ) -> Ticket:
        """Queue a request for a model."""
        early = model.settings.priority * self._settings.ageing_seconds
        ticket = Ticket(model, now, (now - early, next(self._numbers)), may_evict, is_lease)
        self._queue.append(ticket)
        self._queue.sort(key=lambda each: each.order)
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Remove a ticket that was neither granted nor refused."""
        self._leave(ticket)

    def release(self, now: float, lease: Lease) -> None:
        """End a lease; without effect if the runner of that life is gone."""
        model = lease.model
        if model.life != lease.life or model.state is not ModelState.READY:
            return
        model.leases -= 1
        if model.leases == 0:
            model.idle_since = now

    def loaded(self, now: float, model: PooledModel, held_bytes: int) -> None:
        """Report that a load has succeeded.

        Args:
            now: The time.
            model: The model.
            held_bytes: The most that its runner may take, as reserved on the machine.
        """
        model.state = ModelState.READY
        model.held_bytes = min(held_bytes, model.held_bytes)
        model.ready_at = model.idle_since = now

    def evict(self, model: PooledModel) -> None:
        """Begin the eviction of a model; its leases are void."""
        model.state = ModelState.EVICTING
        model.leases = 0
        model.yields_to = None

    def gone(self, model: PooledModel) -> None:
        """Report that a load has failed, or that a runner has died or was stopped."""
        model.state = ModelState.ABSENT
        model.held_bytes = model.leases = 0
        model.yields_to = model.chosen_seconds = None

    def decide(self, now: float, machine_bytes: int, reserve_bytes: int = 0) -> list[Action]:
        """Return what to do now, in this order.

        The scheduler regards the actions as begun when it returns.

        Args:
            now: The time, in seconds.
            machine_bytes: Memory that the machine can give to another runner.
            reserve_bytes: The part of it that spare processes must leave free.
        """
        actions = [*self.grants(now), *self._needless(now), *self._loads(now, machine_bytes)]
        if self.wants_spare(now):
            room = min(self._budget_rest(), machine_bytes - reserve_bytes)
            actions += self.spares.start(now, int(room), only_next=self.is_short)
        hopeless = {ticket.model.name for ticket in self._queue if ticket.is_hopeless}
        for model in self._models.values():
            if model.name not in hopeless:
                model.short_since = None
        return actions

    def next_decision(self, now: float) -> float:
        """Return the time of the next decision if nothing is reported before; may be infinite."""
        times = [expiry for model in self._models.values() if (expiry := self._expiry(model))]
        if self.is_short:
            times.append(now + LOOK_SECONDS)
            times += (self._stays_until(model) for model in self._in(ModelState.READY))
            times += (each.arrived + self._settings.max_wait_seconds for each in self._queue)
        if self.wants_spare(due := self.spares.start_time(only_next=self.is_short)):
            times.append(due)
        return min((time for time in times if time > now), default=math.inf)

    def idle_models(self) -> list[PooledModel]:
        """Return the models that outside pressure may evict, in the order in which to evict."""
        return sorted((each for each in self._models.values() if self._may_go(each)), key=rank)

    def grants(self, now: float) -> Iterator[Grant]:
        """Yield the grants of tickets whose models are loaded; a part of every decision."""
        for ticket in list(self._queue):
            model = ticket.model
            if model.state is not ModelState.READY or _yields(model):
                continue
            self._leave(ticket)
            model.leases += ticket.is_lease
            model.idle_since = now
            yield Grant(ticket, Lease(model, model.life) if ticket.is_lease else None)

    def _leave(self, ticket: Ticket) -> None:
        if ticket in self._queue:
            self._queue.remove(ticket)
        for model in self._models.values():
            if model.yields_to is ticket:
                model.yields_to = None

    def _needless(self, now: float) -> Iterator[Evict]:
        """Yield loads that nobody waits for any more, and models idle for too long."""
        for model in self._models.values():
            if model.state is ModelState.LOADING and not self.waiting(model):
                yield self._evicted(model, "every request for it was cancelled")
            elif (expiry := self._expiry(model)) and expiry <= now:
                yield self._evicted(model, f"idle for {now - model.idle_since:.0f} s")

    def _stays_until(self, model: PooledModel) -> float:
        load_seconds = model.ready_at - model.began_at
        return model.ready_at + max(self._settings.min_residence_seconds, load_seconds)

    def _expiry(self, model: PooledModel) -> float | None:
        if model.keep_alive_seconds == math.inf or not self._may_go(model):
            return None
        return model.idle_since + model.keep_alive_seconds

    def _evicted(self, model: PooledModel, reason: str) -> Evict:
        self.evict(model)
        return Evict(model, reason)

    def _loads(self, now: float, machine_bytes: int) -> Iterator[Action]:
        """Yield loads in the order of the queue, until one has to wait for memory."""
        first: Ticket | None = None
        for ticket in list(self._queue):
            model = ticket.model
            if model.state is not ModelState.ABSENT:
                ticket.reason = ""
                continue
            if first is not None and ticket.may_evict:
                is_same = model is first.model
                ticket.reason = first.reason if is_same else "waiting for the requests before it"
                continue
            short = self._short(model.need, machine_bytes)
            if short <= 0 and first is None:
                machine_bytes -= model.need.total_bytes - self.spares.next_bytes
                yield self._load(now, ticket)
            elif not ticket.may_evict and short > self.spares.rest_bytes:
                yield self._refused_eviction(now, ticket, short - self.spares.rest_bytes)
            elif first is None:
                outcome = list(self._make_room(now, ticket, short))
                if not any(isinstance(each, Refuse) for each in outcome):
                    first = ticket
                yield from outcome
            elif first.model is not model:
                yield self._refused(ticket, kept_for_others(model), 0)
            else:
                ticket.reason = first.reason

    def _load(self, now: float, ticket: Ticket) -> Load:
        model = ticket.model
        model.began_at = now
        model.state = ModelState.LOADING
        model.held_bytes = model.need.total_bytes
        model.life += 1
        ticket.reason = ""
        return Load(model, self.spares.take())

    def _short(self, need: Need, machine_bytes: int) -> int:
        """Return how many bytes a load lacks beside its spare process; 0 or less if it fits."""
        short = self._machine_short(need, machine_bytes)
        if (budget := self._settings.budget_bytes) is not None:
            rest = budget - self.held_bytes + self.spares.next_bytes
            short = max(short, need.total_bytes - rest)
        return short

    def _machine_short(self, need: Need, machine_bytes: int) -> int:
        return need.required_bytes - machine_bytes - self.spares.next_bytes

    def _make_room(self, now: float, ticket: Ticket, short: int) -> Iterator[Action]:
        """Evict for a ticket, or note what it waits for."""
        if refusal := self._hopeless(now, ticket, short):
            yield refusal
            return
        short -= sum(each.held_bytes for each in self._in(ModelState.EVICTING))
        missing = format_bytes(max(short, 0))
        if short <= 0:
            names = ", ".join(each.name for each in self._in(ModelState.EVICTING))
            ticket.reason = f"waiting for the memory of {names}, which is being evicted"
            return
        if short <= self.spares.rest_bytes:
            ticket.reason = f"waiting for {missing}: stopping spare processes"
            yield from self.spares.make_room(now, short)
            return
        ready = self._evictable()
        victims = [each for each in ready if each.is_idle and self._stays_until(each) <= now]
        if chosen := cover(victims, short - self.spares.rest_bytes):
            ticket.reason = f"waiting for {missing}: evicting {described(chosen, now)}"
            yield from self.spares.make_room(now, short - sum(each.held_bytes for each in chosen))
            yield from (
                self._evicted(each, f"to make room for {ticket.model.name}") for each in chosen
            )
            return
        wait = ticket.arrived + self._settings.max_wait_seconds - now
        first = [each for each in ready if each in victims or each.yields_to is ticket]
        others = [each for each in ready if each not in first]
        chosen = cover([*first, *others], short - self.spares.rest_bytes)
        if wait <= 0:
            for each in chosen:
                each.yields_to = ticket
        stay = max((self._stays_until(each) - now for each in chosen), default=0.0)
        turn = when(chosen, wait, stay)
        which = f"{described(chosen, now)}, {turn}" if chosen else "loads in progress"
        ticket.reason = f"waiting for {missing}: {which}"

    def _hopeless(self, now: float, ticket: Ticket, short: int) -> Refuse | None:
        """Return a refusal if the model would not fit even if everything else went."""
        ticket.is_hopeless = False
        going = sum(each.held_bytes for each in self._models.values() if _goes_in_the_end(each))
        going += self.spares.rest_bytes
        if short <= going:
            return None
        need = ticket.model.need
        if (budget := self._settings.budget_bytes) is not None:
            rest = budget - self.kept_bytes
            if need.total_bytes > rest:
                return self._refused(ticket, over_budget(ticket.model, budget, rest), rest)
        model = ticket.model
        ticket.is_hopeless = True
        if model.short_since is None:
            model.short_since = now
        if now - model.short_since < SETTLE_SECONDS:
            return None
        rest = max(0, need.required_bytes - short + going)
        return self._refused(ticket, over_machine(ticket.model, rest), rest)

    def _refused_eviction(self, now: float, ticket: Ticket, short: int) -> Refuse:
        """Refuse a ticket that may not evict, and say what would have to go."""
        chosen = cover(self._evictable(), short)
        rest = max(0, ticket.model.need.total_bytes - short)
        return self._refused(ticket, needs_eviction(ticket.model, short, chosen, now), rest)

    def _refused(self, ticket: Ticket, text: str, available_bytes: int) -> Refuse:
        self._leave(ticket)
        return Refuse(ticket, ticket.model.need.total_bytes, available_bytes, text)

    def _evictable(self) -> list[PooledModel]:
        """Return the loaded models that are not pinned, in the order in which they go."""
        ready = self._in(ModelState.READY)
        return sorted((each for each in ready if not each.stays), key=rank)

    def _in(self, state: ModelState) -> list[PooledModel]:
        return [model for model in self._models.values() if model.state is state]

    def _may_go(self, model: PooledModel) -> bool:
        return model.is_idle and not model.stays and not self.waiting(model)


def _yields(model: PooledModel) -> bool:
    return model.yields_to is not None and not model.stays


def _goes_in_the_end(model: PooledModel) -> bool:
    return not model.stays or model.state is ModelState.EVICTING
