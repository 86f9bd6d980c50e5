"""Messages of an answer."""

from __future__ import annotations

import secrets
import string

from mlxrunner.v1 import runner_pb2 as pb
from runner_server.chat.answer import Answer, ToolCall
from runner_server.engine.types import OutputDelta

_ID_CHARS = string.ascii_letters + string.digits
_ID_LENGTH = 9


async def chat_message(
    part: pb.CompletionResponse, delta: OutputDelta, answer: Answer
) -> pb.ChatResponse:
    """Return the message of an answer for the message of a completion.

    Args:
        part: The message of the completion.
        delta: The delta that the message was made from.
        answer: The answer so far, to which the delta is added.
    """
    new = await answer.add(delta.token_texts, is_last=part.done)
    message = pb.ChatResponse(
        content=new.content,
        reasoning=new.reasoning,
        tool_calls=map(_tool_call, new.tool_calls),
        token_ids=part.token_ids,
        logprobs=part.logprobs,
    )
    if part.HasField("prompt_progress"):
        message.prompt_progress.CopyFrom(part.prompt_progress)
    if part.done:
        message.MergeFrom(_last(part))
        message.reasoning_eval_count = answer.reasoning_count
        if answer.is_required and not answer.has_calls:
            message.constraint_satisfied = False
        if answer.has_calls and part.done_reason == pb.DONE_REASON_STOP:
            message.done_reason = pb.DONE_REASON_TOOL_CALLS
    return message


def _last(part: pb.CompletionResponse) -> pb.ChatResponse:
    return pb.ChatResponse(
        done=True,
        done_reason=part.done_reason,
        stop_match=part.stop_match,
        prompt_eval_count=part.prompt_eval_count,
        prompt_eval_duration=part.prompt_eval_duration,
        eval_count=part.eval_count,
        eval_duration=part.eval_duration,
        queue_duration=part.queue_duration,
        prompt_cached_count=part.prompt_cached_count,
        drafted_count=part.drafted_count,
        draft_accepted_count=part.draft_accepted_count,
        constraint_satisfied=(
            part.constraint_satisfied if part.HasField("constraint_satisfied") else None
        ),
    )


def _tool_call(call: ToolCall) -> pb.ToolCall:
    return pb.ToolCall(id=call.id or _new_id(), name=call.name, arguments=call.arguments)


def _new_id() -> str:
    """Return a random name of a call, in the form that templates of Mistral require."""
    return "".join(secrets.choice(_ID_CHARS) for _ in range(_ID_LENGTH))
