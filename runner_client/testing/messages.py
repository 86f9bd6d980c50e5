"""Messages of a fake runner."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mlxrunner.v1 import runner_pb2 as pb
from runner_common.contract import (
    CONSTRAINT_KINDS,
    DEFAULT_CONTEXT_LENGTH,
    MAX_LOGIT_BIASES,
    MAX_LOGPROB_TOKEN_IDS,
    MAX_LOGPROBS,
    MAX_STOP_TOKEN_IDS,
    MAX_STOPS,
)
from runner_common.generation_fields import shared_fields


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


def capabilities(*, has_cache: bool, has_template: bool) -> pb.Capabilities:
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
        constraint_kinds=[
            pb.ConstraintKind.Value(f"CONSTRAINT_KIND_{kind.upper()}") for kind in CONSTRAINT_KINDS
        ],
    )
