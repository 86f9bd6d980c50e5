"""Messages of ``PoolService`` for the states of a pool, and comparison of load options."""

from __future__ import annotations

from typing import TYPE_CHECKING

from google.protobuf.duration_pb2 import Duration

from mlxrunner.v1 import pool_pb2
from mlxrunner.v1 import runner_pb2 as pb
from runner_client.errors import InvalidRequestError
from runner_client.pool.scheduling.states import ModelState
from runner_client.rpc.messages.requests import load_request
from runner_client.types import LoadOptions
from runner_common.contract import DEFAULT_PARALLEL

if TYPE_CHECKING:
    from collections.abc import Mapping

    from runner_client.memory.estimation import MemoryEstimate
    from runner_client.memory.gate import GateDecision
    from runner_client.pool.scheduling.settings import PoolSettings
    from runner_client.pool.types import PoolModel, PoolStatus
    from runner_client.types import Dtype

_STATES = {
    ModelState.ABSENT: pool_pb2.POOL_MODEL_STATE_ABSENT,
    ModelState.LOADING: pool_pb2.POOL_MODEL_STATE_LOADING,
    ModelState.READY: pool_pb2.POOL_MODEL_STATE_READY,
    ModelState.EVICTING: pool_pb2.POOL_MODEL_STATE_EVICTING,
}

_PARTS = {
    "weights": "weight_bytes",
    "KV cache": "kv_bytes",
    "prefix cache": "prefix_cache_bytes",
    "working memory": "working_bytes",
    "process": "process_bytes",
    "load transient": "load_transient_bytes",
}
"""Fields of the message by the names in ``MemoryNeed.parts``."""

_DTYPES: Mapping[int, Dtype] = {
    pb.DTYPE_UNSPECIFIED: "auto",
    pb.DTYPE_AUTO: "auto",
    pb.DTYPE_AUTO_OR_STORED: "auto_or_stored",
    pb.DTYPE_AS_STORED: "as_stored",
    pb.DTYPE_FLOAT32: "float32",
    pb.DTYPE_BFLOAT16: "bfloat16",
    pb.DTYPE_FLOAT16: "float16",
}


def pool_message(status: PoolStatus, settings: PoolSettings) -> pool_pb2.ListModelsResponse:
    """Return the state of a pool, with the configured models that it has not seen yet."""
    known = {model.name for model in status.models}
    unseen = [
        pool_pb2.PoolModel(name=name, state=pool_pb2.POOL_MODEL_STATE_ABSENT, pinned=each.pinned)
        for name, each in settings.models.items()
        if name not in known
    ]
    return pool_pb2.ListModelsResponse(
        budget_bytes=status.budget_bytes or 0,
        held_bytes=status.held_bytes,
        models=[*map(model_message, status.models), *unseen],
        spare_count=status.spare_count if settings.spare_processes else None,
        spare_bytes=status.spare_bytes if settings.spare_processes else None,
    )


def model_message(model: PoolModel) -> pool_pb2.PoolModel:
    """Return the state of a model."""
    return pool_pb2.PoolModel(
        name=model.name,
        path=model.path,
        state=_STATES[model.state],
        held_bytes=model.held_bytes,
        memory=_memory(model.parts),
        progress=model.progress,
        reason=model.reason,
        position=model.position,
        lease_count=model.leases,
        waiting_count=model.waiting_count,
        idle_duration=None if model.idle_seconds is None else duration(model.idle_seconds),
        pinned=model.is_pinned,
        last_error=model.last_error,
        pid=model.pid or 0,
    )


def _memory(parts: Mapping[str, int]) -> pool_pb2.PoolModelMemory:
    return pool_pb2.PoolModelMemory(**{_PARTS[name]: size for name, size in parts.items()})


def duration(seconds: float) -> Duration:
    """Return a span of time."""
    message = Duration()
    message.FromNanoseconds(round(seconds * 1e9))
    return message


def without_times(message: pool_pb2.ListModelsResponse) -> bytes:
    """Return a state in a form that is equal for states that differ only in time."""
    copy = pool_pb2.ListModelsResponse()
    copy.CopyFrom(message)
    for model in copy.models:
        model.ClearField("idle_duration")
    return copy.SerializeToString(deterministic=True)


def require_configured(request: pb.LoadRequest, options: LoadOptions) -> None:
    """Refuse options of a load that are neither the defaults nor those of the configuration.

    Raises:
        InvalidRequestError: An option differs, by name.
    """
    configured = load_request("", options)
    wrong = [
        (field.name, "the options of a model are set in the pool's configuration; leave it out")
        for field, value in request.ListFields()
        if field.name != "model"
        and value != getattr(configured, field.name)
        and value != _DEFAULTS.get(field.name)
    ]
    if wrong:
        text = "; ".join(f"{name}: {problem}" for name, problem in wrong)
        raise InvalidRequestError(text, field_violations=wrong)


_DEFAULTS: Mapping[str, object] = {"dtype": pb.DTYPE_AUTO, "parallel": DEFAULT_PARALLEL}
"""Values that some clients send for an option that their caller has not set."""


def load_options(request: pb.LoadRequest | pb.EstimateRequest) -> LoadOptions:
    """Return the options of a request, without ``memory_override``.

    Raises:
        InvalidRequestError: A value is out of range.
    """
    if request.dtype not in _DTYPES:
        text = f"{request.dtype} is not a dtype that this server supports"
        raise InvalidRequestError(f"dtype: {text}", field_violations=[("dtype", text)])
    sizes = {"context_length", "parallel", "memory_limit_bytes", "prefix_cache_bytes"}
    given = {field.name: value for field, value in request.ListFields() if field.name in sizes}
    dtype = _DTYPES[request.dtype]
    adapters = {adapter.name: adapter.path for adapter in request.adapters}
    if len(adapters) < len(request.adapters):
        text = "two adapters have the same name"
        raise InvalidRequestError(f"adapters: {text}", field_violations=[("adapters", text)])
    return LoadOptions(
        dtype=dtype,
        allow_inexact=request.allow_inexact,
        kv_bits=request.kv_bits,
        adapters=adapters,
        draft_model=request.draft_model or None,
        **given,
    )


def estimate_message(found: MemoryEstimate, decision: GateDecision) -> pb.EstimateResponse:
    """Return an estimate, compared with the memory available now."""
    need = found.need
    return pb.EstimateResponse(
        weight_bytes=need.weight_bytes,
        kv_bytes=need.kv_bytes,
        prefix_cache_bytes=need.prefix_cache_bytes,
        working_bytes=need.working_bytes,
        process_bytes=need.process_bytes,
        load_transient_bytes=need.load_transient_bytes,
        total_bytes=need.total_bytes,
        required_bytes=need.required_bytes,
        available_bytes=decision.available_bytes,
        overhead_bytes=decision.overhead_bytes,
        reserved_bytes=decision.reserved_bytes,
        fits=need.required_bytes <= decision.available_bytes,
        dtype=found.dtype,
        context_length=found.context_length,
        parallel=found.parallel,
        notes=found.notes,
    )
