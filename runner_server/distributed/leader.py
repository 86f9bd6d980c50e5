"""Rank 0's model library: each call is told to the followers, and then made here."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from runner_server.distributed.faults import fault_of
from runner_server.distributed.hub import Hub
from runner_server.engine.backend import Backend, BackendLost, Batch, Codec, LoadedModel
from runner_server.engine.types import (
    Event,
    LoadSpec,
    MemoryCounters,
    ModelInfo,
    Sampling,
)
from runner_server.errors import RunnerFault

_POLL_SECONDS = 0.1
"""How often a load that waits for others looks whether it was cancelled."""

_READ = 95
"""Progress of a load that has read its own part."""


class _Phase(enum.Enum):
    """How far a load is: on this rank alone, on all but each for itself, or in step."""

    ALONE = enum.auto()
    READING = enum.auto()
    TOGETHER = enum.auto()


class LeaderPartners:
    """What a load and a batch on rank 0 share with the other ranks; see ``Partners``.

    Args:
        hub: The other ranks.
    """

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._expected: set[int] = set()
        self._phase = _Phase.ALONE

    def clock(self) -> float:
        """Seconds that pass; all ranks read the same."""
        now = time.perf_counter()
        self._hub.tell("clock", now)
        return now

    def begin_load(self, spec: LoadSpec) -> None:
        """Has the others load."""
        self._expected = set(range(len(self._hub.others)))
        self._phase = _Phase.READING
        self._hub.tell("load", asdict(spec) | {"dtype": spec.dtype.value})

    def finish_load(self, report: Callable[[int], None], kv_share: float) -> float:
        """Waits until all have read their parts; see ``Partners.finish_load``.

        Raises:
            RunnerFault: One could not, and why.
        """
        shares = [kv_share]
        while self._expected:
            report(_READ)
            place = min(self._expected)
            if answer := self._answer(place):
                shares.append(self._share(place, answer))
        self._phase = _Phase.TOGETHER
        self._hub.tell("go")
        return min(shares)

    def _share(self, place: int, answer: list[Any]) -> float:
        kind, *values = answer
        if kind == "loaded":
            return float(values[0])
        rank = self._hub.others[place]
        raise fault_of(f"rank {rank.rank} on {rank.host}", *values)

    def end_step(self) -> None:
        """Notes that no rank waits in the middle of something that all do together."""
        if self._phase is _Phase.TOGETHER:
            self._phase = _Phase.ALONE

    def abort(self) -> bool:
        """Has the others drop what they load; returns whether that could be done.

        Raises:
            BackendLost: A rank is gone.
        """
        phase, self._phase = self._phase, _Phase.ALONE
        if phase is not _Phase.READING:
            return phase is _Phase.ALONE
        self._hub.tell("abort")
        while self._expected:
            self._answer(min(self._expected))
        return True

    def _answer(self, place: int) -> list[Any] | None:
        """A follower's answer to the load, of which there is exactly one; None if none came yet."""
        answer = self._hub.answer(place, _POLL_SECONDS)
        if answer:
            self._expected.discard(place)
        return answer


class LeaderBackend:
    """Implements ``runner_server.engine.backend.Backend`` on rank 0.

    Args:
        backend: The model library of this process.
        hub: The other ranks.
        partners: Those that ``backend`` was made with.
    """

    def __init__(self, backend: Backend, hub: Hub, partners: LeaderPartners) -> None:
        self._backend = backend
        self._hub = hub
        self._partners = partners

    def open(self) -> str:
        """Imports the library; see ``Backend.open``."""
        return self._backend.open()

    def check(self, spec: LoadSpec) -> None:
        """Looks at the model's files on this rank; see ``Backend.check``."""
        self._backend.check(spec)

    def load(self, spec: LoadSpec, report: Callable[[int], None]) -> LoadedModel:
        """Loads a part of a model on each rank; see ``Backend.load``."""

        def report_or_stop(progress: int) -> None:
            try:
                report(progress)
            except RunnerFault:
                # Not in the middle of a warm-up: what was loaded can be dropped.
                self._partners.end_step()
                raise

        try:
            model = self._backend.load(spec, report_or_stop)
        except BackendLost:
            raise
        except Exception as error:
            # In a warm-up the others may wait for this rank.
            if not self._partners.abort():
                raise self._hub.lost(error) from error
            raise
        self._partners.end_step()
        return LeaderModel(model, self._hub)

    def memory(self) -> MemoryCounters:
        """What the library holds on this rank."""
        return self._backend.memory()

    def release(self, *, for_next: bool = False) -> None:
        """Gives back what a model has held, on all ranks."""
        self._hub.tell("release", for_next)
        self._backend.release(for_next=for_next)

    def trim(self) -> None:
        """Gives freed memory back, on all ranks."""
        self._hub.tell("trim")
        self._backend.trim()

    def close(self) -> None:
        """Ends the other ranks and the use of the library here."""
        self._hub.close()
        self._backend.close()


class LeaderModel:
    """A model in the memory of several processes.

    Args:
        model: The part of this one.
        hub: The other ranks.
    """

    def __init__(self, model: LoadedModel, hub: Hub) -> None:
        self._model = model
        self._hub = hub

    @property
    def info(self) -> ModelInfo:
        """What it is; its bytes are those of this rank."""
        return self._model.info

    @property
    def codec(self) -> Codec:
        """Its tokenizer."""
        return self._model.codec

    @property
    def kv_bytes(self) -> Callable[[int], int]:
        """See ``LoadedModel.kv_bytes``: on this rank."""
        return self._model.kv_bytes

    def limit_prefix_cache(self, limit_bytes: int) -> None:
        """See ``LoadedModel.limit_prefix_cache``: the same on all ranks."""
        self._hub.tell("limit_prefix_cache", limit_bytes)
        self._model.limit_prefix_cache(limit_bytes)

    def new_batch(self) -> LeaderBatch:
        """An empty batch on all ranks."""
        self._hub.tell("new_batch")
        return LeaderBatch(self._model.new_batch(), self._hub)


class LeaderBatch:
    """Rows that all ranks evaluate together; see ``Batch``.

    Whatever raises in it ends all ranks: the others may wait for this one in the middle of
    a step.

    Args:
        batch: The batch of this rank.
        hub: The other ranks.
    """

    def __init__(self, batch: Batch, hub: Hub) -> None:
        self._batch = batch
        self._hub = hub

    def add(self, row: int, prompt_ids: Sequence[int], sampling: Sampling) -> None:
        """See ``Batch.add``."""
        with self._told("add", row, list(prompt_ids), asdict(sampling)):
            self._batch.add(row, prompt_ids, sampling)

    def remove(self, rows: Collection[int]) -> None:
        """See ``Batch.remove``."""
        with self._told("remove", list(rows)):
            self._batch.remove(rows)

    def preempt(self, row: int) -> None:
        """See ``Batch.preempt``."""
        with self._told("preempt", row):
            self._batch.preempt(row)

    def resume(self, row: int) -> None:
        """See ``Batch.resume``."""
        with self._told("resume", row):
            self._batch.resume(row)

    def step(self) -> list[Event]:
        """See ``Batch.step``."""
        with self._told("step"):
            return self._batch.step()

    def close(self) -> None:
        """See ``Batch.close``."""
        with self._told("close_batch"):
            self._batch.close()

    @contextmanager
    def _told(self, *message: object) -> Iterator[None]:
        self._hub.tell(*message)
        try:
            yield
        except BackendLost:
            raise
        except Exception as error:
            raise self._hub.lost(error) from error
