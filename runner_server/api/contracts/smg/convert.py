"""Conversion of the engine's data to messages of the gateway's protocol."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from smg_grpc_proto import mlx_engine_pb2 as pb

from runner_server.api.contracts.smg.validation import Message
from runner_server.engine.logprobs import TokenLogprob
from runner_server.engine.types import FinishReason, GenerationStats, OutputDelta

ABORTED = "abort"
"""Finish reason of an aborted request, the same as in other engines behind the gateway."""

_FINISH_REASONS = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}


def chunk_message(delta: OutputDelta, sent: int, stats: GenerationStats) -> Message:
    """Return a chunk of new tokens.

    Args:
        delta: The new tokens.
        sent: Number of tokens sent before.
        stats: Statistics of the request, for its prompt counts.
    """
    chunk = pb.GenerateStreamChunk(
        token_ids=delta.token_ids,
        prompt_tokens=stats.prompt_count,
        completion_tokens=sent + len(delta.token_ids),
        cached_tokens=stats.cached_count,
        output_logprobs=_logprobs(delta.logprobs),
    )
    return pb.GenerateResponse(chunk=chunk)


def complete_message(
    last: OutputDelta | None, unsent: Sequence[OutputDelta], count: int, stats: GenerationStats
) -> Message:
    """Return the last message of a request.

    Args:
        last: The last delta, if any. Without ``done`` the request was aborted.
        unsent: Deltas not sent in chunks: all of them if the request is not streamed.
        count: Number of tokens of the output.
        stats: Statistics of the request, for its prompt counts.
    """
    done = last.done if last else None
    by_token = last and done and done.reason is FinishReason.STOP
    complete = pb.GenerateComplete(
        output_ids=[token_id for delta in unsent for token_id in delta.token_ids],
        finish_reason=_FINISH_REASONS[done.reason] if done else ABORTED,
        prompt_tokens=stats.prompt_count,
        completion_tokens=count,
        cached_tokens=stats.cached_count,
        output_logprobs=_logprobs(entry for delta in unsent for entry in delta.logprobs),
        matched_stop_token_id=last.token_ids[-1] if last and by_token else None,
    )
    return pb.GenerateResponse(complete=complete)


def _logprobs(entries: Iterable[TokenLogprob]) -> Message | None:
    """Convert log probabilities; return None if there are none."""
    entries = list(entries)
    if not entries:
        return None
    return pb.OutputLogProbs(
        token_ids=[entry.token_id for entry in entries],
        token_logprobs=[entry.logprob for entry in entries],
        top_logprobs=[_top(entry) for entry in entries],
    )


def _top(entry: TokenLogprob) -> Message:
    return pb.TopLogProbs(
        token_ids=[token_id for token_id, _ in entry.top],
        values=[logprob for _, logprob in entry.top],
    )
