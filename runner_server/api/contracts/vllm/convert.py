"""Conversion of the engine's data to messages of ``VllmEngine``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from smg_grpc_proto import vllm_engine_pb2 as pb

from runner_server.api.contracts.vllm.validation import Message
from runner_server.engine.generation_request import GenerationRequest
from runner_server.engine.logprobs import PromptLogprobs, TokenLogprob
from runner_server.engine.types import EngineState, FinishReason, OutputDelta

ABORTED = "abort"
"""Finish reason of an aborted request."""

_FINISH_REASONS = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}


class Answer:
    """Messages of one of the answers to a request.

    Args:
        request: The running request.
        index: Number of the answer, from 0.
        is_stream: Whether tokens are sent in chunks.
    """

    def __init__(self, request: GenerationRequest, index: int, *, is_stream: bool) -> None:
        self._request = request
        self._index = index
        self._is_stream = is_stream
        self._count = 0
        self._last: OutputDelta | None = None
        self._unsent: list[OutputDelta] = []
        self._prompt: list[PromptLogprobs] = []

    def add(self, delta: OutputDelta) -> Message | None:
        """Take new output; return a chunk if one is due."""
        self._last = delta
        self._count += len(delta.token_ids)
        self._prompt += delta.prompt_logprobs
        if not self._is_stream:
            self._unsent.append(delta)
            return None
        return self._chunk(delta) if delta.token_ids else None

    def _chunk(self, delta: OutputDelta) -> Message:
        stats = self._request.stats()
        chunk = pb.GenerateStreamChunk(
            token_ids=delta.token_ids,
            prompt_tokens=stats.prompt_count,
            completion_tokens=self._count,
            cached_tokens=stats.cached_count,
            output_logprobs=_logprobs(delta.logprobs),
            input_logprobs=self._take_prompt(),
            index=self._index,
        )
        return pb.GenerateResponse(chunk=chunk)

    def complete(self) -> Message:
        """Return the last message. Without an outcome the request was aborted."""
        stats = self._request.stats()
        done = self._last.done if self._last else None
        complete = pb.GenerateComplete(
            output_ids=[token_id for delta in self._unsent for token_id in delta.token_ids],
            finish_reason=_FINISH_REASONS[done.reason] if done else ABORTED,
            prompt_tokens=stats.prompt_count,
            completion_tokens=self._count,
            cached_tokens=stats.cached_count,
            output_logprobs=_logprobs(entry for delta in self._unsent for entry in delta.logprobs),
            input_logprobs=self._take_prompt(),
            index=self._index,
            spec_accepted_tokens=stats.accepted_count,
            spec_draft_tokens=stats.drafted_count,
        )
        if done and done.stop_match:
            complete.matched_stop_str = done.stop_match
        elif done and done.reason is FinishReason.STOP and self._stop_token is not None:
            complete.matched_token_id = self._stop_token
        return pb.GenerateResponse(complete=complete)

    @property
    def _stop_token(self) -> int | None:
        """The last token if it is one of the request's stop tokens, which vLLM tells from EOS."""
        ids = self._last.token_ids if self._last else ()
        return ids[-1] if ids and ids[-1] in self._request.spec.stop_token_ids else None

    def _take_prompt(self) -> Message | None:
        """Return the log probabilities of the prompt the first time; None without any."""
        parts, self._prompt = self._prompt, []
        spec = self._request.spec
        if spec.sampling.prompt_logprobs is None or (len(spec.prompt_ids) > 1 and not parts):
            return None
        entries = [entry for part in parts for entry in part.entries()]
        # The first token follows nothing, so it has no log probability.
        values = [pb.InputTokenLogProb()]
        values += [pb.InputTokenLogProb(value=entry.logprob) for entry in entries]
        return pb.InputLogProbs(
            token_logprobs=values,
            token_ids=spec.prompt_ids,
            top_logprobs=[pb.TopLogProbs(), *map(_top, entries)],
        )


def load_message(state: EngineState) -> Message:
    """Return the load of the engine."""
    running, waiting = state.running_count, state.queued_count
    capacity = state.kv_token_capacity
    usage = state.kv_token_count / capacity if capacity else 0.0
    return pb.SchedulerLoad(
        num_running_reqs=running,
        num_waiting_reqs=waiting,
        num_total_reqs=running + waiting,
        num_used_tokens=state.kv_token_count,
        max_total_num_tokens=capacity,
        token_usage=usage,
        gen_throughput=state.tokens_per_second,
        cache_hit_rate=state.prefix_cached_ratio,
        utilization=usage,
        max_running_requests=state.model.parallel if state.model else 0,
    )


def _logprobs(entries: Iterable[TokenLogprob]) -> Message | None:
    """Convert log probabilities; return None if there are none."""
    found: Sequence[TokenLogprob] = list(entries)
    if not found:
        return None
    return pb.OutputLogProbs(
        token_ids=[entry.token_id for entry in found],
        token_logprobs=[entry.logprob for entry in found],
        top_logprobs=[_top(entry) for entry in found],
    )


def _top(entry: TokenLogprob) -> Message:
    return pb.TopLogProbs(
        token_ids=[token_id for token_id, _ in entry.top],
        values=[logprob for _, logprob in entry.top],
    )
