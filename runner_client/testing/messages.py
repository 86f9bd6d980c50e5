"""Messages of a fake runner."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mlxrunner.v1 import runner_pb2 as pb
from runner_common.contract import (
    CONSTRAINT_KINDS,
    DEFAULT_CONTEXT_LENGTH,
    DEFAULT_PARALLEL,
    MAX_EMBED_INPUTS,
    MAX_LOGIT_BIASES,
    MAX_LOGPROB_TOKEN_IDS,
    MAX_LOGPROBS,
    MAX_STOP_TOKEN_IDS,
    MAX_STOPS,
)
from runner_common.generation_fields import shared_fields

_USUAL_DTYPES = (
    pb.DTYPE_UNSPECIFIED,
    pb.DTYPE_AUTO,
    pb.DTYPE_AUTO_OR_STORED,
    pb.DTYPE_FLOAT32,
)
_DTYPE_NAMES = {
    pb.DTYPE_AS_STORED: "as_stored",
    pb.DTYPE_BFLOAT16: "bfloat16",
    pb.DTYPE_FLOAT16: "float16",
}


def text_of(message: pb.ChatMessage) -> str:
    """Return the text of a message, or the joined texts of its parts."""
    return message.content or "".join(part.text for part in message.content_parts)


def as_chat(
    parts: Iterator[pb.CompletionResponse], reasoning: Sequence[str], calls: Sequence[pb.ToolCall]
) -> Iterator[pb.ChatResponse]:
    """Yield an answer: its reasoning, and the messages of a completion, the last with calls."""
    is_first = True
    for part in parts:
        if is_first and not part.HasField("prompt_progress"):
            is_first = False
            yield from (pb.ChatResponse(reasoning=text, token_ids=[0]) for text in reasoning)
        message = pb.ChatResponse(**{field.name: value for field, value in part.ListFields()})
        if part.done:
            message.eval_count += len(reasoning)
            message.reasoning_eval_count = len(reasoning)
            message.tool_calls.extend(calls)
            if calls:
                message.done_reason = pb.DONE_REASON_TOOL_CALLS
        yield message


def as_completion(request: pb.CompletionRequest | pb.ChatRequest) -> pb.CompletionRequest:
    """Return the request for a completion with the same options."""
    if isinstance(request, pb.CompletionRequest):
        return request
    return pb.CompletionRequest(**shared_fields(request))


def capabilities(*, has_cache: bool, has_template: bool, dimension: int) -> pb.Capabilities:
    """Return the capabilities of a model, with the limits of the protocol."""
    return pb.Capabilities(
        batched=True,
        prefix_cache=has_cache,
        max_context_length=DEFAULT_CONTEXT_LENGTH,
        max_logprobs=MAX_LOGPROBS,
        max_stop_count=MAX_STOPS,
        max_logit_bias_count=MAX_LOGIT_BIASES,
        rank_count=1,
        max_stop_token_id_count=MAX_STOP_TOKEN_IDS,
        max_logprob_token_id_count=MAX_LOGPROB_TOKEN_IDS,
        chat=has_template,
        reasoning=True,
        tools=True,
        required_tools=True,
        completion=True,
        embedding_dimension=dimension,
        max_embed_count=MAX_EMBED_INPUTS if dimension else 0,
        max_embed_tokens=DEFAULT_CONTEXT_LENGTH if dimension else 0,
        constraint_kinds=[
            pb.ConstraintKind.Value(f"CONSTRAINT_KIND_{kind.upper()}") for kind in CONSTRAINT_KINDS
        ],
    )


def need_message(
    request: pb.LoadRequest | pb.EstimateRequest, model_bytes: int, available_bytes: int
) -> pb.EstimateResponse:
    """Return the need of a load: the weights alone.

    Args:
        request: The load.
        model_bytes: The weights as float32.
        available_bytes: The available memory.
    """
    is_usual = request.dtype in _USUAL_DTYPES
    is_short = model_bytes > available_bytes
    is_fallback = request.dtype == pb.DTYPE_AUTO_OR_STORED and is_short
    size = model_bytes if is_usual and not is_fallback else model_bytes // 2
    dtype = "as_stored" if is_fallback else _DTYPE_NAMES.get(request.dtype, "float32")
    return pb.EstimateResponse(
        weight_bytes=size,
        total_bytes=size,
        required_bytes=size,
        available_bytes=available_bytes,
        fits=size <= available_bytes,
        dtype=dtype,
        context_length=request.context_length or DEFAULT_CONTEXT_LENGTH,
        parallel=request.parallel or DEFAULT_PARALLEL,
        notes=["it would be held as stored"] if is_fallback else [],
    )
