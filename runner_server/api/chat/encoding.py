"""Messages of an answer."""

from __future__ import annotations

from mlxrunner.v1 import runner_pb2 as pb
from runner_server.chat.answer import Answer
from runner_server.engine.types import OutputDelta


def chat_message(
    part: pb.CompletionResponse, delta: OutputDelta, answer: Answer
) -> pb.ChatResponse:
    """Return the message of an answer for the message of a completion.

    Args:
        part: The message of the completion.
        delta: The delta that the message was made from.
        answer: The answer so far, to which the delta is added.
    """
    new = answer.add(delta.token_texts, is_last=part.done)
    message = pb.ChatResponse(
        content=new.content,
        reasoning=new.reasoning,
        token_ids=part.token_ids,
        logprobs=part.logprobs,
    )
    if part.HasField("prompt_progress"):
        message.prompt_progress.CopyFrom(part.prompt_progress)
    if part.done:
        message.MergeFrom(_last(part))
        message.reasoning_eval_count = answer.reasoning_count
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
    )
