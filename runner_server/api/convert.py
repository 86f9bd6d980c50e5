"""Conversion of the engine's data to messages of the protocol."""

from __future__ import annotations

import sys

from google.protobuf.duration_pb2 import Duration

from mlxrunner.v1 import runner_pb2 as pb
from runner_common.contract import (
    MAX_EMBED_INPUTS,
    MAX_LOGIT_BIASES,
    MAX_LOGPROB_TOKEN_IDS,
    MAX_LOGPROBS,
    MAX_STOP_TOKEN_IDS,
    MAX_STOPS,
)
from runner_server.api.constraints import CONSTRAINT_KIND_VALUES
from runner_server.api.estimator import Estimated
from runner_server.engine.logprobs import TokenLogprob
from runner_server.engine.output.prompt_text import PromptTexts
from runner_server.engine.output.token_text import TokenText, TokenTexts
from runner_server.engine.types import (
    DraftInfo,
    FinishReason,
    GenerationResult,
    MemoryCounters,
    ModelInfo,
    OutputDelta,
    Rank,
    State,
)

STATES = {
    State.IDLE: pb.STATE_IDLE,
    State.LOADING: pb.STATE_LOADING,
    State.ACTIVE: pb.STATE_ACTIVE,
    State.DRAINING: pb.STATE_DRAINING,
    State.FAILED: pb.STATE_FAILED,
    State.STOPPING: pb.STATE_STOPPING,
}

_DONE_REASONS = {
    FinishReason.STOP: pb.DONE_REASON_STOP,
    FinishReason.LENGTH: pb.DONE_REASON_LENGTH,
}


_MAX_VECTORS_BYTES = 4 * 2**20 - 65_536
"""Most bytes of vectors in an answer, which stays below gRPC's default limit of 4 MiB."""

_VECTOR_BYTES = 24
"""Bytes of a vector's message without its values, at most."""


def duration(seconds: float) -> Duration:
    """Convert seconds to a ``Duration``, clamped at 0."""
    value = Duration()
    value.FromNanoseconds(max(0, round(seconds * 1e9)))
    return value


def max_embed_count(info: ModelInfo) -> int:
    """Return the most texts of a request; 0 if the model does not embed."""
    if info.embedding.problem:
        return 0
    most = _MAX_VECTORS_BYTES // (4 * info.embedding.dimension + _VECTOR_BYTES)
    return min(MAX_EMBED_INPUTS, most)


def model_message(info: ModelInfo, rank_count: int = 1) -> pb.Model:
    """Convert the description of a model, held by a number of processes together."""
    return pb.Model(
        name=info.name,
        path=info.path,
        architecture=info.architecture,
        context_length=info.max_context_length,
        vocab_size=info.vocab_size,
        weight_bytes=info.weight_bytes,
        dtype=info.dtype,
        quantization_bits=info.quantization_bits,
        eos_token_ids=sorted(info.eos_token_ids),
        dtype_fallback=info.dtype_fallback,
        warnings=info.warnings,
        kv_bits=info.kv_bits,
        adapters=[pb.Adapter(name=each.name, path=each.path) for each in info.adapters],
        capabilities=pb.Capabilities(
            batched=info.parallel > 1,
            prefix_cache=info.prefix_cache_bytes > 0,
            max_context_length=info.context_length,
            max_logprobs=min(MAX_LOGPROBS, info.vocab_size),
            max_stop_count=MAX_STOPS,
            max_logit_bias_count=MAX_LOGIT_BIASES,
            rank_count=rank_count,
            max_stop_token_id_count=MAX_STOP_TOKEN_IDS,
            max_logprob_token_id_count=MAX_LOGPROB_TOKEN_IDS,
            chat=info.chat.has_template,
            tools=info.chat.has_template and bool(info.chat.answer.tool_parser),
            reasoning=info.chat.has_template and bool(info.chat.answer.think_start),
            required_tools=(
                info.takes_constraints
                and info.chat.has_template
                and info.chat.answer.can_require_calls
            ),
            constraint_kinds=CONSTRAINT_KIND_VALUES if info.takes_constraints else [],
            completion=info.completes,
            embedding_dimension=info.embedding.dimension,
            max_embed_count=max_embed_count(info),
            max_embed_tokens=info.embedding.max_tokens,
        ),
        draft_model=_draft_message(info.draft) if info.draft else None,
    )


def _draft_message(draft: DraftInfo) -> pb.DraftModel:
    return pb.DraftModel(
        name=draft.name,
        path=draft.path,
        architecture=draft.architecture,
        weight_bytes=draft.weight_bytes,
        context_length=draft.context_length,
    )


def memory_message(
    memory: MemoryCounters, process_bytes: int, limit_bytes: int = 0, device: str = ""
) -> pb.MemoryUsage:
    """Convert the memory counters of a process."""
    return pb.MemoryUsage(
        active_bytes=memory.active_bytes,
        cache_bytes=memory.cache_bytes,
        peak_bytes=memory.peak_bytes,
        process_bytes=process_bytes,
        limit_bytes=limit_bytes,
        prefix_cache_bytes=memory.prefix_cache_bytes,
        prefix_cache_limit_bytes=memory.prefix_cache_limit_bytes,
        other_bytes=_other_bytes(memory, process_bytes, device),
    )


def _other_bytes(memory: MemoryCounters, process_bytes: int, device: str) -> int:
    """Return the bytes of the resident set that MLX does not hold.

    CUDA memory is not part of the resident set, so all of it counts there.
    """
    if device.startswith("gpu") and sys.platform != "darwin":
        return process_bytes
    return max(0, process_bytes - memory.active_bytes - memory.cache_bytes)


def rank_message(rank: Rank) -> pb.Rank:
    """Convert the description of a rank."""
    return pb.Rank(
        rank=rank.rank,
        host=rank.host,
        pid=rank.pid,
        device=rank.device,
        memory_usage=memory_message(rank.memory, rank.process_bytes, rank.limit_bytes, rank.device),
    )


def delta_message(
    delta: OutputDelta, texts: TokenTexts | None = None, prompt_texts: PromptTexts | None = None
) -> pb.CompletionResponse:
    """Convert a delta of a stream.

    Args:
        delta: The delta.
        texts: Decodes the generated tokens of log probabilities; None if there are none.
        prompt_texts: The same for the tokens of the prompt.
    """
    message = pb.CompletionResponse(content=delta.text, token_ids=delta.token_ids)
    if texts:
        message.logprobs.extend(
            _logprob_message(entry, *texts.read(entry)) for entry in delta.logprobs
        )
    if prompt_texts:
        entries = (read for part in delta.prompt_logprobs for read in prompt_texts.read(part))
        message.prompt_logprobs.extend(_logprob_message(*entry) for entry in entries)
    if delta.prefill:
        evaluated, total = delta.prefill
        message.prompt_progress.CopyFrom(
            pb.PromptProgress(evaluated_count=evaluated, total_count=total)
        )
    if delta.done:
        message.MergeFrom(_done_message(delta.done))
    return message


def _done_message(done: GenerationResult) -> pb.CompletionResponse:
    return pb.CompletionResponse(
        done=True,
        done_reason=_DONE_REASONS[done.reason],
        stop_match=done.stop_match,
        prompt_eval_count=done.prompt_count,
        prompt_eval_duration=duration(done.prompt_seconds),
        eval_count=done.eval_count,
        eval_duration=duration(done.eval_seconds),
        queue_duration=duration(done.queue_seconds),
        prompt_cached_count=done.cached_count,
        constraint_satisfied=done.is_satisfied,
        drafted_count=done.drafted_count,
        draft_accepted_count=done.accepted_count,
    )


def _logprob_message(
    entry: TokenLogprob, own: TokenText, texts_of_others: list[TokenText]
) -> pb.TokenLogprob:
    others = [
        pb.TopLogprob(token_id=id_, text=shown.text, bytes=shown.data, logprob=logprob)
        for (id_, logprob), shown in zip(entry.others, texts_of_others, strict=True)
    ]
    return pb.TokenLogprob(
        token_id=entry.token_id,
        text=own.text,
        bytes=own.data,
        logprob=entry.logprob,
        top=others[: len(entry.top)],
        candidates=others[len(entry.top) :],
    )


def estimate_message(estimated: Estimated) -> pb.EstimateResponse:
    """Convert an estimate."""
    answer, decision = estimated.answer, estimated.decision
    need = answer.need
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
        fits=decision.fits,
        dtype=answer.dtype,
        context_length=answer.context_length,
        parallel=estimated.parallel,
        notes=estimated.notes,
    )
