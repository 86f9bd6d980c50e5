"""Memory estimates for the ``Estimate`` rpc, made without loading a model."""

from __future__ import annotations

import asyncio
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from runner_common.memory.need_query import (
    NeedAnswer,
    NeedRefusedError,
    NeedRequest,
    NeedUnknownError,
    ask_need,
)
from runner_server.engine.faults import stopping_fault
from runner_server.engine.types import Dtype, LoadSpec
from runner_server.errors import (
    GenerationFailed,
    InsufficientMemory,
    InvalidField,
    ModelNotFound,
    ModelUnsupported,
    RunnerFault,
)
from runner_server.host.machine_admission import refusal
from runner_server.mlx_backend.loading.finding import find_adapters, find_model

if TYPE_CHECKING:
    from runner_common.memory.reservations import Decision
    from runner_server.host.machine_admission import MachineAdmission
    from runner_server.host.model_root import ModelRoot


logger = logging.getLogger(__name__)

_THREADS = 2
"""Size of a separate thread pool, because estimates of several models wait seconds for each other,
and tokenization must not queue behind them."""


@dataclass(frozen=True)
class Estimated:
    """Memory a load would need, compared with the available memory.

    Attributes:
        answer: The need, part by part.
        decision: The decision on a load at this moment.
        parallel: Number of sequences counted.
        notes: Choices made for the load, and differences of the model from its files.
    """

    answer: NeedAnswer
    decision: Decision
    parallel: int
    notes: tuple[str, ...] = ()


class Estimator:
    """Estimates loads in short-lived processes; see :mod:`runner_common.memory.need_query`.

    Args:
        admission: Compares needs with the memory of the machine.
        root: Directory that models must be below; None allows any.
    """

    def __init__(self, admission: MachineAdmission, root: ModelRoot | None = None) -> None:
        self._admission = admission
        self._root = root
        self._threads = ThreadPoolExecutor(_THREADS, "estimate")
        self._running: set[asyncio.Future[Estimated]] = set()
        self._is_closed = False

    async def estimate(self, spec: LoadSpec) -> Estimated:
        """Estimate a load. Takes about half a second unless the answer is cached.

        Raises:
            RunnerFault: The fault that the load itself would raise.
        """
        if self._is_closed:
            raise stopping_fault()
        loop = asyncio.get_running_loop()
        running = loop.run_in_executor(self._threads, self._estimate, spec)
        self._running.add(running)
        try:
            return await running
        except asyncio.CancelledError:
            if self._is_closed:
                raise stopping_fault() from None
            raise
        finally:
            self._running.discard(running)

    async def require_fit(self, spec: LoadSpec) -> None:
        """Refuse a load that could not succeed, while a loaded model can still be kept.

        A load for which no estimate can be made passes, and so does a model that is not found,
        because the load itself refuses it before it unloads.

        Raises:
            InsufficientMemory: The model does not fit, and ``memory_override`` is not set.
            RunnerFault: Another fault that the load itself would raise.
        """
        try:
            estimated = await self.estimate(spec)
        except (GenerationFailed, ModelNotFound):
            return
        if not (estimated.decision.fits or spec.memory_override):
            raise refusal(estimated.answer.need, estimated.decision)

    def close(self) -> None:
        """Cancel running estimates; their callers get :class:`ShuttingDown`."""
        self._is_closed = True
        for running in self._running:
            running.cancel()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _estimate(self, spec: LoadSpec) -> Estimated:
        located = find_model(spec.model, self._root)
        # The answering process knows no root.
        find_adapters(spec.adapters, self._root)
        found = self._estimate_at(located.path, spec)
        return replace(found, notes=(located.note, *found.notes)) if located.note else found

    def _estimate_at(self, path: Path, spec: LoadSpec) -> Estimated:
        if spec.dtype is not Dtype.AUTO_OR_STORED:
            return self._estimate_as(path, spec, spec.dtype)
        usual = self._usual(path, spec)
        if usual and (usual.decision.fits or usual.answer.dtype == Dtype.AS_STORED.value):
            return usual
        stored = self._estimate_as(path, spec, Dtype.AS_STORED)
        usual_dtype = usual.answer.dtype if usual else Dtype.FLOAT32.value
        note = f"there is too little memory for {usual_dtype}: it would be held as stored"
        return replace(stored, notes=(*stored.notes, note))

    def _usual(self, path: Path, spec: LoadSpec) -> Estimated | None:
        """Return the estimate for the usual format; None if above the requested memory limit."""
        try:
            return self._estimate_as(path, spec, Dtype.AUTO)
        except InsufficientMemory:
            return None

    def _estimate_as(self, path: Path, spec: LoadSpec, dtype: Dtype) -> Estimated:
        draft_path = str(find_model(spec.draft_model, self._root).path) if spec.draft_model else ""
        answer = _query_need(path, replace(spec, dtype=dtype, draft_model=draft_path))
        decision = self._admission.compare(answer.need.required_bytes)
        return Estimated(answer, decision, answer.parallel, answer.notes)


def _query_need(path: Path, spec: LoadSpec) -> NeedAnswer:
    request = NeedRequest(
        path=str(path),
        context_length=spec.context_length,
        parallel=spec.parallel,
        dtype=spec.dtype.value,
        memory_limit_bytes=spec.memory_limit_bytes,
        prefix_cache_bytes=spec.prefix_cache_bytes,
        allow_inexact=spec.allow_inexact,
        kv_bits=spec.kv_bits,
        adapters=tuple((each.name, each.path) for each in spec.adapters),
        draft_path=spec.draft_model,
    )
    try:
        return ask_need(request, os.environ)
    except NeedRefusedError as refusal:
        raise _fault(refusal) from refusal
    except NeedUnknownError as error:
        # The message has the end of the process's traceback, which only the log should get.
        logger.error("no estimate of %r: %s", str(path), error)  # noqa: TRY400 - has the cause
        raise GenerationFailed(
            "the process that estimates the memory gave no answer; see the runner's log"
        ) from error


def _fault(refusal: NeedRefusedError) -> RunnerFault:
    """Convert a refusal to the fault the load itself would raise."""
    if refusal.reason == "INVALID_FIELD":
        return InvalidField(refusal.violations)
    if refusal.reason == "INSUFFICIENT_MEMORY":
        return InsufficientMemory(str(refusal), **refusal.metadata)
    if refusal.reason == "MODEL_UNSUPPORTED":
        return ModelUnsupported(str(refusal), **refusal.metadata)
    return GenerationFailed(str(refusal))
