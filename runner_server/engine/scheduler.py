"""The scheduler: admission, preemption, and the engine's next work item.

The scheduler decides, and the backend's executor runs what was decided. The scheduler neither uses
MLX nor reads a clock: it gets durations from the report of each item.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from contextlib import suppress

from runner_server.engine.backend import Executor, LoadedModel
from runner_server.engine.batch_planner import BatchPlanner
from runner_server.engine.embedding.request import AnyRequest, EmbeddingRequest
from runner_server.engine.generation_request import GenerationRequest
from runner_server.engine.request import RequestStatus
from runner_server.engine.types import Event
from runner_server.engine.work import WorkItem, WorkReport

SECONDS_PER_LEVEL = 1.0
"""Waiting time that counts like one level of priority. A request of the lowest priority, -100, is
overtaken by those of the highest that arrive within 200 s."""


def queue_position(request: AnyRequest) -> float:
    """Return the position of a waiting request; the smallest one is admitted first.

    All waiting requests age at the same pace, so that their order does not depend on the present
    time: a level of priority counts like an arrival :data:`SECONDS_PER_LEVEL` earlier.
    """
    return request.submitted_at - SECONDS_PER_LEVEL * request.priority


class Scheduler:
    """Orders the work of the requests on the engine's thread.

    Admission goes by :func:`queue_position`, which is first come, first served for requests of
    equal priority: the others do not overtake the first one if its memory does not fit.
    Preempted requests whose readers have caught up are resumed before waiting ones are admitted.
    Requests to embed need no slot, so they overtake those that only lack one, but memory for their
    longest text; as many of them as there are slots are admitted at a time.
    :class:`BatchPlanner` alternates prefill and decode steps of the admitted requests.

    Args:
        max_draft: Most tokens to draft for a request that is alone in the batch; 0 drafts none.

    Attributes:
        waiting: Generations that are WAITING, in order of admission.
        admitted: Generations with KV caches, by id: those in the batch and the PREEMPTED ones.
        resumable: PREEMPTED requests whose readers have caught up, in the order they did.
        waiting_texts: Requests to embed that are WAITING, in order of admission.
        embedding: Requests to embed that are admitted, by id.
    """

    def __init__(self, max_draft: int = 0) -> None:
        self._max_draft = max_draft
        self.waiting: list[GenerationRequest] = []
        self.admitted: dict[int, GenerationRequest] = {}
        self.resumable: deque[GenerationRequest] = deque()
        self.waiting_texts: list[EmbeddingRequest] = []
        self.embedding: dict[int, EmbeddingRequest] = {}
        self._planner: BatchPlanner | None = None

    def start_batch(self, model: LoadedModel, executor: Executor) -> None:
        """Start planning for a new executor, which has no rows yet."""
        limits, max_draft = model.prefill_limits, min(self._max_draft, model.max_draft)
        draft = model.info.draft
        self._planner = BatchPlanner(
            limits,
            executor.find_prefix,
            max_draft,
            executor.find_on_disk,
            draft_length=draft.context_length if draft else 0,
        )

    @property
    def running(self) -> list[GenerationRequest]:
        """The requests in the batch."""
        preempted = RequestStatus.PREEMPTED
        return [each for each in self.admitted.values() if each.status is not preempted]

    @property
    def preempted(self) -> list[GenerationRequest]:
        """The requests outside the batch that keep their KV caches."""
        preempted = RequestStatus.PREEMPTED
        return [each for each in self.admitted.values() if each.status is preempted]

    @property
    def has_running(self) -> bool:
        """True if the batch is not empty, or texts are being embedded."""
        preempted = RequestStatus.PREEMPTED
        is_batch = any(each.status is not preempted for each in self.admitted.values())
        return is_batch or bool(self.embedding)

    @property
    def all_admitted(self) -> list[AnyRequest]:
        """The admitted requests of both kinds."""
        return [*self.admitted.values(), *self.embedding.values()]

    def add(self, request: AnyRequest) -> None:
        """Queue a request, after those with the same position."""
        if isinstance(request, EmbeddingRequest):
            insort(self.waiting_texts, request, key=queue_position)
        else:
            insort(self.waiting, request, key=queue_position)

    def mark_resumable(self, request_id: int) -> None:
        """Queue a request to be resumed. No-op unless preempted."""
        request = self.admitted.get(request_id)
        if request is None or request.status is not RequestStatus.PREEMPTED:
            return
        if request not in self.resumable:
            self.resumable.append(request)

    def admit(self, model: LoadedModel) -> list[AnyRequest]:
        """Admit and resume requests while slots and memory are free.

        Returns:
            The admitted requests, now PREFILLING, which the caller adds to the executor. The rows
            of resumed requests are already there.
        """
        admitted: list[AnyRequest] = []
        while (request := self._next(model)) is not None:
            if isinstance(request, EmbeddingRequest):
                self._admit_texts(request)
                admitted.append(request)
            elif request.status is RequestStatus.PREEMPTED:
                self.resumable.popleft()
                request.resume()
                self._require_planner().resume(request.id)
            else:
                self._admit_generation(request)
                admitted.append(request)
        return admitted

    def _admit_texts(self, request: EmbeddingRequest) -> None:
        self.waiting_texts.pop(0)
        request.admit()
        self.embedding[request.id] = request
        self._require_planner().add_texts(request.id, [len(text) for text in request.spec.texts])

    def _admit_generation(self, request: GenerationRequest) -> None:
        self.waiting.pop(0)
        request.admit()
        self.admitted[request.id] = request
        spec = request.spec
        self._require_planner().add(
            request.id,
            spec.prompt_ids,
            spec.cache_policy,
            needs_logits=spec.sampling.prompt_logprobs is not None,
            max_drafted=spec.max_tokens,
        )

    def next_item(self) -> WorkItem | None:
        """Return the next work item, which the caller runs and records; see ``BatchPlanner``."""
        return self._require_planner().next_item()

    def record(self, item: WorkItem, report: WorkReport) -> list[Event]:
        """Record the result of a work item; return the events for the requests."""
        return self._require_planner().record(item, report)

    def slow_readers(self) -> list[GenerationRequest]:
        """Return the DECODING requests whose readers are too far behind, to be preempted."""
        decoding = RequestStatus.DECODING
        full = [each for each in self.admitted.values() if each.stream.is_full]
        return [each for each in full if each.status is decoding]

    def preempt(self, request: GenerationRequest) -> None:
        """Take a request out of the batch until its reader has caught up."""
        request.preempt()
        self._require_planner().preempt(request.id)

    def has_next(self, model: LoadedModel) -> bool:
        """Return True if :meth:`admit` would admit or resume a request."""
        return self._next(model) is not None

    def _next(self, model: LoadedModel) -> AnyRequest | None:
        """Return the request to admit or resume next; None if there is none, or no memory."""
        if not (self.resumable or self.waiting or self.waiting_texts):
            return None
        running, most = self.running, model.info.parallel
        has_slot = len(running) < most
        heads: list[AnyRequest] = []
        if self.resumable and has_slot:
            # Before the others, because it holds memory that they may wait for.
            heads.append(self.resumable[0])
        else:
            heads += self.waiting[: int(has_slot and not self.resumable)]
            heads += self.waiting_texts[: int(len(self.embedding) < most)]
        first = min(heads, key=queue_position, default=None)
        return first if first and self._fits(first, running, model) else None

    def remove(self, request: AnyRequest) -> bool:
        """Forget a request; return True if it was admitted and so has KV caches to free."""
        if isinstance(request, EmbeddingRequest):
            is_admitted = self.embedding.pop(request.id, None) is not None
            with suppress(ValueError):
                self.waiting_texts.remove(request)
        else:
            is_admitted = self.admitted.pop(request.id, None) is not None
            with suppress(ValueError):
                (self.resumable if is_admitted else self.waiting).remove(request)
        if self._planner:
            self._planner.remove(request.id)
        return is_admitted

    def clear(self) -> None:
        """Forget every request, and drop the references to the executor."""
        self.waiting.clear()
        self.admitted.clear()
        self.resumable.clear()
        self.waiting_texts.clear()
        self.embedding.clear()
        self._planner = None

    def _require_planner(self) -> BatchPlanner:
        if self._planner is None:
            raise RuntimeError("no batch has been started")
        return self._planner

    def _fits(
        self,
        request: AnyRequest,
        running: list[GenerationRequest],
        model: LoadedModel,
    ) -> bool:
        """Return True if memory suffices even once every request has its maximum length."""
        if not running and request.status is RequestStatus.PREEMPTED:
            # Slow readers of the other preempted requests must not block this one. At worst it
            # exceeds the budget by the memory of one sequence.
            return True
        lengths = [other.max_length for other in running]
        # A request to embed holds the caches of one text at a time.
        texts = [other.max_length for other in self.embedding.values()]
        (texts if isinstance(request, EmbeddingRequest) else lengths).append(request.max_length)
        # Every row of a batch takes the memory of the longest.
        need = len(lengths) * model.kv_bytes(max(lengths, default=1))
        # Preempted requests do not grow.
        held = [other.length for other in self.preempted if other is not request]
        return need + sum(map(model.kv_bytes, (*texts, *held))) <= model.info.kv_budget_bytes
