"""The model library on rank 0, which sends each call to the followers before making the call."""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

from runner_server.distributed import messages as msg
from runner_server.distributed.faults import fault_of
from runner_server.distributed.hub import Hub
from runner_server.engine.backend import (
    Backend,
    BackendLost,
    Codec,
    Executor,
    Grammars,
    LoadedModel,
    Matcher,
)
from runner_server.engine.prefill_queue import PrefillLimits
from runner_server.engine.prefix_cache import Match
from runner_server.engine.types import (
    CachePolicy,
    LoadSpec,
    MemoryCounters,
    ModelInfo,
    Sampling,
)
from runner_server.engine.work import DecodeItem, EmbedItem, PrefillItem, WorkItem, WorkReport
from runner_server.errors import InvalidField, RunnerFault

_POLL_SECONDS = 0.1
"""Interval at which a load waiting for other ranks checks for cancellation."""

_READ = 95
"""Progress of a load once rank 0 has read its own part."""


class _Phase(enum.Enum):
    """Stage of a load.

    Attributes:
        ALONE: Other ranks are not involved.
        READING: All ranks read their parts independently.
        TOGETHER: All ranks make the same MLX calls in step.
    """

    ALONE = enum.auto()
    READING = enum.auto()
    TOGETHER = enum.auto()


class LeaderPartners:
    """Coordinates a load on rank 0 with the other ranks; see ``Partners``.

    Args:
        hub: The other ranks.
    """

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._expected: set[int] = set()
        self._phase = _Phase.ALONE

    def begin_load(self, spec: LoadSpec) -> None:
        """Start the load on the other ranks."""
        self._expected = set(range(len(self._hub.others)))
        self._phase = _Phase.READING
        self._hub.broadcast(msg.StartLoad(spec))

    def finish_load(self, report: Callable[[int], None], kv_share: float) -> float:
        """Wait until every rank has read its part; see ``Partners.finish_load``.

        Raises:
            RunnerFault: Another rank could not load, or ``report`` has cancelled the load.
            BackendLost: A rank is lost.
        """
        shares = [kv_share]
        while self._expected:
            report(_READ)
            index = min(self._expected)
            if answer := self._answer(index):
                shares.append(self._share(index, answer))
        self._phase = _Phase.TOGETHER
        self._hub.broadcast(msg.FinishLoad())
        return min(shares)

    def _share(self, index: int, answer: msg.LoadRead | msg.LoadFailed) -> float:
        if isinstance(answer, msg.LoadRead):
            return answer.kv_share
        rank = self._hub.others[index]
        raise fault_of(f"rank {rank.rank} on {rank.host}", answer)

    def end_step(self) -> None:
        """Record the end of a step made by every rank together."""
        if self._phase is _Phase.TOGETHER:
            self._phase = _Phase.ALONE

    def abort(self) -> bool:
        """Cancel the load on the other ranks.

        Returns:
            False if the load cannot be cancelled any more, because the ranks are in step.

        Raises:
            BackendLost: A rank is lost.
        """
        phase, self._phase = self._phase, _Phase.ALONE
        if phase is not _Phase.READING:
            return phase is _Phase.ALONE
        self._hub.broadcast(msg.AbortLoad())
        while self._expected:
            self._answer(min(self._expected))
        return True

    def _answer(self, index: int) -> msg.LoadRead | msg.LoadFailed | None:
        """Return a follower's only answer to the load; None if it has not arrived yet."""
        answer = self._hub.answer(index, _POLL_SECONDS)
        if answer:
            self._expected.discard(index)
        return answer


class LeaderBackend:
    """Implements ``runner_server.engine.backend.Backend`` with every rank.

    Args:
        backend: The model library of this process.
        hub: The other ranks.
        partners: The object that ``backend`` was created with, for the same hub.
    """

    def __init__(self, backend: Backend, hub: Hub, partners: LeaderPartners) -> None:
        self._backend = backend
        self._hub = hub
        self._partners = partners

    def open(self) -> str:
        """Import the library; see ``Backend.open``."""
        return self._backend.open()

    def check(self, spec: LoadSpec) -> None:
        """Check the model's files on this rank, and refuse adapters; see ``Backend.check``."""
        if spec.adapters:
            text = "a model that several ranks hold cannot have adapters; fuse one with mlx_lm.fuse"
            raise InvalidField([("adapters", text)])
        self._backend.check(spec)

    def load(self, spec: LoadSpec, report: Callable[[int], None]) -> LoadedModel:
        """Load a part of a model on each rank; see ``Backend.load``."""

        def report_or_stop(progress: int) -> None:
            try:
                report(progress)
            except RunnerFault:
                # Progress is reported between steps, when the other ranks can still drop the model.
                self._partners.end_step()
                raise

        try:
            model = self._backend.load(spec, report_or_stop)
        except BackendLost:
            raise
        except Exception as error:
            # In the middle of a step, the other ranks may be waiting for this one.
            if not self._partners.abort():
                raise self._hub.lost(error) from error
            raise
        self._partners.end_step()
        return LeaderModel(model, self._hub)

    def memory(self) -> MemoryCounters:
        """Return the memory counters of the library on this rank."""
        return self._backend.memory()

    def release(self, *, for_next: bool = False) -> None:
        """Free the memory of a model on every rank; see ``Backend.release``."""
        self._hub.broadcast(msg.Release(for_next))
        self._backend.release(for_next=for_next)

    def trim(self) -> None:
        """Return freed memory to the system on every rank."""
        self._hub.broadcast(msg.Trim())
        self._backend.trim()

    def close(self) -> None:
        """End the other ranks and close the library of this one."""
        self._hub.close()
        self._backend.close()


class LeaderModel:
    """A model split among the ranks; see ``LoadedModel``.

    Args:
        model: The part on this rank.
        hub: The other ranks.
    """

    def __init__(self, model: LoadedModel, hub: Hub) -> None:
        self._model = model
        self._hub = hub

    @property
    def info(self) -> ModelInfo:
        """Description of the model. The byte counts are for this rank."""
        return self._model.info

    @property
    def codec(self) -> Codec:
        """Tokenizer of the model."""
        return self._model.codec

    @property
    def grammars(self) -> Grammars:
        """Compiler of constraints, used on this rank alone: the others take its tokens."""
        return self._model.grammars

    @property
    def kv_bytes(self) -> Callable[[int], int]:
        """Function from tokens to the bytes on this rank; see ``LoadedModel.kv_bytes``."""
        return self._model.kv_bytes

    def limit_prefix_cache(self, limit_bytes: int) -> None:
        """Limit the prefix cache of every rank; see ``LoadedModel.limit_prefix_cache``."""
        self._hub.broadcast(msg.LimitPrefixCache(limit_bytes))
        self._model.limit_prefix_cache(limit_bytes)

    def save_prefixes(self, *, is_idle: bool) -> bool:  # noqa: ARG002 - has none
        """Return False: ranks have no prefix cache on disk."""
        return False

    def close(self) -> None:
        """Do nothing: ranks have no prefix cache on disk."""

    @property
    def max_draft(self) -> int:
        """Most tokens of a draft; see ``LoadedModel.max_draft``: ranks get no drafts."""
        return 0

    @property
    def prefill_limits(self) -> PrefillLimits:
        """Limits of prefill chunks on this rank; see ``LoadedModel.prefill_limits``."""
        return self._model.prefill_limits

    def new_executor(self) -> LeaderExecutor:
        """Return an executor without rows on every rank."""
        self._hub.broadcast(msg.NewExecutor())
        return LeaderExecutor(self._model.new_executor(), self._hub)


class LeaderExecutor:
    """Runs work items on every rank; see ``Executor``.

    An exception ends all ranks, because the others may be waiting for this one in the middle of a
    work item.

    Args:
        executor: The executor of this rank.
        hub: The other ranks.
    """

    def __init__(self, executor: Executor, hub: Hub) -> None:
        self._executor = executor
        self._hub = hub

    def add(
        self,
        row: int,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        cache_policy: CachePolicy,
        matcher: Matcher | None = None,
        adapter: str = "",  # noqa: ARG002 - loads with adapters are refused
    ) -> None:
        """See ``Executor.add``. Only this rank has the matcher: the others take its tokens."""
        message = msg.AddRow(row, tuple(prompt_ids), sampling, cache_policy)
        with self._sent_to_followers(message):
            self._executor.add(row, prompt_ids, sampling, cache_policy, matcher)

    def add_texts(self, row: int, texts: Sequence[Sequence[int]]) -> None:
        """See ``Executor.add_texts``."""
        with self._sent_to_followers(msg.AddTexts(row, tuple(map(tuple, texts)))):
            self._executor.add_texts(row, texts)

    def find_prefix(self, prompt_ids: Sequence[int], salt: str) -> Match:
        """Look a prompt up on this rank; see ``Executor.find_prefix``."""
        return self._executor.find_prefix(prompt_ids, salt)

    def find_on_disk(self, _prompt_ids: Sequence[int], _salt: str) -> int:
        """Return 0: ranks have no prefix cache on disk."""
        return 0

    def run(self, item: WorkItem) -> WorkReport:
        """Run a work item on every rank; see ``Executor.run``."""
        with self._sent_to_followers(_message_of(item)):
            return self._executor.run(item)

    def preempt(self, row: int) -> None:
        """See ``Executor.preempt``."""
        with self._sent_to_followers(msg.PreemptRow(row)):
            self._executor.preempt(row)

    def remove(self, rows: Collection[int]) -> None:
        """See ``Executor.remove``."""
        with self._sent_to_followers(msg.RemoveRows(tuple(rows))):
            self._executor.remove(rows)

    def close(self) -> None:
        """See ``Executor.close``."""
        with self._sent_to_followers(msg.CloseExecutor()):
            self._executor.close()

    @contextmanager
    def _sent_to_followers(self, message: msg.FromLeader) -> Iterator[None]:
        self._hub.broadcast(message)
        try:
            yield
        except BackendLost:
            raise
        except Exception as error:
            raise self._hub.lost(error) from error


def _message_of(item: WorkItem) -> msg.FromLeader:
    match item:
        case PrefillItem(chunks):
            return msg.RunPrefill(chunks)
        case EmbedItem(texts):
            return msg.RunEmbed(texts)
        case DecodeItem(joining, expected):
            return msg.RunDecode(joining, expected)
    raise TypeError("ranks have neither a prefix cache on disk nor a draft model")
