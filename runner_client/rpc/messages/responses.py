"""Results of calls, from the responses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlxrunner.v1 import runner_pb2 as pb
from runner_client.types import (
    Capabilities,
    Completion,
    CompletionChunk,
    DoneReason,
    DraftModel,
    DrainResult,
    LoadEstimate,
    LoadResult,
    MemoryUsage,
    Model,
    PromptProgress,
    Rank,
    State,
    Status,
    TokenLogprob,
    TopLogprob,
)
from runner_common.contract import CONSTRAINT_KINDS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from google.protobuf.duration_pb2 import Duration

_STATES = {
    pb.STATE_IDLE: State.IDLE,
    pb.STATE_LOADING: State.LOADING,
    pb.STATE_ACTIVE: State.ACTIVE,
    pb.STATE_DRAINING: State.DRAINING,
    pb.STATE_FAILED: State.FAILED,
    pb.STATE_STOPPING: State.STOPPING,
}

_DONE_REASONS = {
    pb.DONE_REASON_STOP: DoneReason.STOP,
    pb.DONE_REASON_LENGTH: DoneReason.LENGTH,
    pb.DONE_REASON_TOOL_CALLS: DoneReason.TOOL_CALLS,
}

_CONSTRAINT_KINDS = {
    pb.ConstraintKind.Value(f"CONSTRAINT_KIND_{kind.upper()}"): kind for kind in CONSTRAINT_KINDS
}


def drain_result(message: pb.DrainResponse) -> DrainResult:
    """Convert the response of a drain."""
    return DrainResult(message.finished_count, message.aborted_count)


def load_result(message: pb.LoadResponse) -> LoadResult:
    """Convert the response of a load."""
    return LoadResult(_model(message.model), _seconds(message.load_duration))


def _model(message: pb.Model) -> Model:
    return Model(
        name=message.name,
        path=message.path,
        architecture=message.architecture,
        context_length=message.context_length,
        vocab_size=message.vocab_size,
        weight_bytes=message.weight_bytes,
        dtype=message.dtype,
        quantization_bits=message.quantization_bits,
        eos_token_ids=tuple(message.eos_token_ids),
        dtype_fallback=message.dtype_fallback,
        warnings=tuple(message.warnings),
        kv_bits=message.kv_bits,
        adapters={adapter.name: adapter.path for adapter in message.adapters},
        capabilities=_capabilities(message.capabilities),
        draft_model=_draft_model(message.draft_model) if message.HasField("draft_model") else None,
    )


def _draft_model(message: pb.DraftModel) -> DraftModel:
    return DraftModel(
        name=message.name,
        path=message.path,
        architecture=message.architecture,
        weight_bytes=message.weight_bytes,
        context_length=message.context_length,
    )


def _capabilities(message: pb.Capabilities) -> Capabilities:
    """Convert the fields that the server has set."""
    told = {field.name: value for field, value in message.ListFields()}
    if kinds := told.pop("constraint_kinds", ()):
        told["constraint_kinds"] = tuple(_CONSTRAINT_KINDS.get(kind, "unknown") for kind in kinds)
    return Capabilities(**told)


def load_estimate(message: pb.EstimateResponse) -> LoadEstimate:
    """Convert the response of an estimate."""
    return LoadEstimate(
        weight_bytes=message.weight_bytes,
        kv_bytes=message.kv_bytes,
        prefix_cache_bytes=message.prefix_cache_bytes,
        working_bytes=message.working_bytes,
        process_bytes=message.process_bytes,
        load_transient_bytes=message.load_transient_bytes,
        total_bytes=message.total_bytes,
        required_bytes=message.required_bytes,
        available_bytes=message.available_bytes,
        overhead_bytes=message.overhead_bytes,
        reserved_bytes=message.reserved_bytes,
        fits=message.fits,
        dtype=message.dtype,
        context_length=message.context_length,
        parallel=message.parallel,
        notes=tuple(message.notes),
    )


def status(message: pb.StatusResponse) -> Status:
    """Convert the response of a status call."""
    age = message.last_progress_age
    return Status(
        state=_STATES.get(message.state, State.UNKNOWN),
        progress=message.progress,
        context_length=message.context_length,
        memory_bytes=message.memory,
        memory_usage=_memory_usage(message.memory_usage),
        model=_model(message.model) if message.HasField("model") else None,
        parallel=message.parallel,
        running_count=message.running_count,
        queued_count=message.queued_count,
        step_count=message.step_count,
        last_progress_age_seconds=_seconds(age) if message.HasField("last_progress_age") else None,
        uptime_seconds=_seconds(message.uptime_duration),
        runner_id=message.runner_id,
        pid=message.pid,
        device=message.device,
        server_version=message.server_version,
        last_error=message.last_error,
        blas=message.blas,
        ranks=tuple(map(_rank, message.ranks)),
        kv_token_count=message.kv_token_count,
        kv_token_capacity=message.kv_token_capacity,
        prefix_cached_ratio=message.prefix_cached_ratio,
        tokens_per_second=message.tokens_per_second,
    )


def _rank(message: pb.Rank) -> Rank:
    return Rank(
        rank=message.rank,
        host=message.host,
        pid=message.pid,
        device=message.device,
        memory_usage=_memory_usage(message.memory_usage),
    )


def _memory_usage(message: pb.MemoryUsage) -> MemoryUsage:
    return MemoryUsage(
        active_bytes=message.active_bytes,
        cache_bytes=message.cache_bytes,
        peak_bytes=message.peak_bytes,
        process_bytes=message.process_bytes,
        limit_bytes=message.limit_bytes,
        prefix_cache_bytes=message.prefix_cache_bytes,
        other_bytes=message.other_bytes,
        reserved_bytes=message.reserved_bytes,
        prefix_cache_limit_bytes=message.prefix_cache_limit_bytes,
    )


def completion_chunk(message: pb.CompletionResponse | pb.ChatResponse) -> CompletionChunk:
    """Convert a message of a completion's stream."""
    of_prompt = message.prompt_logprobs if isinstance(message, pb.CompletionResponse) else ()
    chunk = CompletionChunk(
        content=message.content,
        token_ids=tuple(message.token_ids),
        logprobs=tuple(map(_token_logprob, message.logprobs)),
        prompt_progress=_prompt_progress(message),
        prompt_logprobs=tuple(map(_token_logprob, of_prompt)),
    )
    return _last_chunk(message, chunk) if message.done else chunk


def _last_chunk(
    message: pb.CompletionResponse | pb.ChatResponse, chunk: CompletionChunk
) -> CompletionChunk:
    return CompletionChunk(
        content=chunk.content,
        token_ids=chunk.token_ids,
        logprobs=chunk.logprobs,
        prompt_progress=chunk.prompt_progress,
        prompt_logprobs=chunk.prompt_logprobs,
        done=True,
        done_reason=_DONE_REASONS.get(message.done_reason, DoneReason.UNKNOWN),
        stop_match=message.stop_match or None,
        prompt_eval_count=message.prompt_eval_count,
        prompt_eval_seconds=_seconds(message.prompt_eval_duration),
        eval_count=message.eval_count,
        eval_seconds=_seconds(message.eval_duration),
        queue_seconds=_seconds(message.queue_duration),
        prompt_cached_count=message.prompt_cached_count,
        constraint_satisfied=_constraint_satisfied(message),
        drafted_count=message.drafted_count,
        draft_accepted_count=message.draft_accepted_count,
    )


def _constraint_satisfied(message: pb.CompletionResponse | pb.ChatResponse) -> bool | None:
    return message.constraint_satisfied if message.HasField("constraint_satisfied") else None


def _prompt_progress(
    message: pb.CompletionResponse | pb.ChatResponse,
) -> PromptProgress | None:
    if not message.HasField("prompt_progress"):
        return None
    progress = message.prompt_progress
    return PromptProgress(progress.evaluated_count, progress.total_count)


def _token_logprob(message: pb.TokenLogprob) -> TokenLogprob:
    return TokenLogprob(
        message.token_id,
        message.text,
        message.logprob,
        tuple(map(_top_logprob, message.top)),
        message.bytes,
        tuple(map(_top_logprob, message.candidates)),
    )


def _top_logprob(message: pb.TopLogprob) -> TopLogprob:
    return TopLogprob(message.token_id, message.text, message.logprob, message.bytes)


def join_chunks(chunks: Sequence[CompletionChunk]) -> Completion:
    """Join the chunks of a finished stream; the last chunk has ``done`` set."""
    last = chunks[-1]
    return Completion(
        content="".join(chunk.content for chunk in chunks),
        token_ids=tuple(token for chunk in chunks for token in chunk.token_ids),
        logprobs=tuple(logprob for chunk in chunks for logprob in chunk.logprobs),
        prompt_logprobs=tuple(entry for chunk in chunks for entry in chunk.prompt_logprobs),
        done_reason=last.done_reason or DoneReason.UNKNOWN,
        stop_match=last.stop_match,
        prompt_eval_count=last.prompt_eval_count,
        prompt_eval_seconds=last.prompt_eval_seconds,
        eval_count=last.eval_count,
        eval_seconds=last.eval_seconds,
        queue_seconds=last.queue_seconds,
        prompt_cached_count=last.prompt_cached_count,
        constraint_satisfied=last.constraint_satisfied,
        drafted_count=last.drafted_count,
        draft_accepted_count=last.draft_accepted_count,
    )


def _seconds(duration: Duration) -> float:
    return duration.seconds + duration.nanos / 1e9
