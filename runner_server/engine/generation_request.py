"""A request in the engine: status, text, counts and times."""

from __future__ import annotations

import time
from dataclasses import replace

from runner_server.engine.backend import Codec, Matcher
from runner_server.engine.output.channel import OutputChannel
from runner_server.engine.output.text import StopMatcher, StreamDecoder
from runner_server.engine.request import EngineRequest, RequestStatus
from runner_server.engine.types import (
    CompletionSpec,
    FinishReason,
    GenerationResult,
    GenerationStats,
    OutputDelta,
    Prefill,
    Token,
)

_PART_TEXTS = 128
"""Most texts in one delta of a prompt's log probabilities. A message takes whole deltas, so a
single large one could exceed its limit."""


class GenerationRequest(EngineRequest[OutputChannel]):
    """Turns the tokens of one row into the deltas of one output channel.

    Any thread may call :meth:`stats`.

    Args:
        spec: The validated request.
        codec: The tokenizer of the model that ``spec`` was validated for.
        eos_token_ids: The model's own end tokens.
        matcher: Constrains the text; None without a constraint.

    Attributes:
        spec: The validated request.
        matcher: Constrains the text; None without a constraint, and once finished.
        end_ids: The tokens that end the text and add nothing to it.
    """

    def __init__(
        self,
        spec: CompletionSpec,
        codec: Codec,
        eos_token_ids: frozenset[int],
        matcher: Matcher | None = None,
    ) -> None:
        max_length = len(spec.prompt_ids) + spec.max_tokens
        super().__init__(spec.request_id, spec.priority, max_length, OutputChannel())
        self.spec = spec
        self.matcher = matcher
        self._texts: list[str] = []
        self._decoder = StreamDecoder(codec.decode, spec.prompt_ids)
        self._stops = StopMatcher(spec.stop)
        model_end_ids = frozenset[int]() if spec.ignore_eos else eos_token_ids
        self.end_ids = model_end_ids | spec.stop_token_ids
        self._token_count = 0
        self._cached_count = 0
        self._drafted_count = 0
        self._accepted_count = 0
        self._prefilled_count = 0
        self._reason: FinishReason | None = None
        self._first_token_at: float | None = None
        self._preempted_at = 0.0
        self._preempted_seconds = 0.0

    @property
    def kv_token_count(self) -> int:
        """Number of tokens in the KV cache. Thread-safe."""
        if self.status in (RequestStatus.WAITING, RequestStatus.FINISHED):
            return 0
        # The last token gets its keys and values in the next step.
        return self.length - 1 if self._token_count else self._prefilled_count

    @property
    def length(self) -> int:
        """Number of tokens in the sequence so far, prompt included."""
        return len(self.spec.prompt_ids) + self._token_count

    # -- transitions -------------------------------------------------------------

    def preempt(self) -> None:
        """Transition from DECODING to PREEMPTED: the reader is slow, so the slot becomes free."""
        self._transition(RequestStatus.PREEMPTED, RequestStatus.DECODING)
        self._preempted_at = time.monotonic()

    def resume(self) -> None:
        """Transition from PREEMPTED to DECODING: the request takes a slot again."""
        self._transition(RequestStatus.DECODING, RequestStatus.PREEMPTED)
        self._preempted_seconds += time.monotonic() - self._preempted_at

    def _finish(self) -> None:
        super()._finish()
        self.matcher = None

    # -- events ------------------------------------------------------------------

    def on_prefill(self, event: Prefill) -> None:
        """Put the progress of the prompt, and its log probabilities, into the channel."""
        self._cached_count = event.cached
        self._prefilled_count = event.prefilled
        progress = OutputDelta(prefill=(event.prefilled, event.total))
        if event.logprobs is None:
            self.stream.put(progress)
            return
        most = max(1, _PART_TEXTS // (1 + event.logprobs.width))
        for part in event.logprobs.parts(most):
            self.stream.put(replace(progress, prompt_logprobs=(part,)))

    def on_draft(self, count: int) -> None:
        """Count checked tokens of a draft."""
        self._drafted_count += count

    def on_token(self, event: Token) -> GenerationResult | None:
        """Add a token. The first one starts DECODING, and the last one finishes the request.

        Returns:
            The result if this was the last token; otherwise None.
        """
        if self.status is not RequestStatus.DECODING:
            self._transition(RequestStatus.DECODING, RequestStatus.PREFILLING)
            self._first_token_at = time.monotonic()
        self._token_count += 1
        self._accepted_count += event.is_drafted
        end = self._end_at(event.token_id)
        text = self._read(event.token_id, end)
        shown, stop = self._find_stop(text)
        if stop is not None:
            end = FinishReason.STOP
        elif end:
            shown += self._stops.flush()
        if self.matcher:
            self._texts.append(shown)
        logprobs = (replace(event.logprob, text=text),) if event.logprob else ()
        is_cut = stop is not None or event.token_id in self.spec.stop_token_ids
        result = self._result(end, stop or "", self._is_satisfied(is_cut=is_cut)) if end else None
        self.stream.put(OutputDelta(shown, (event.token_id,), logprobs, done=result))
        return result

    def _find_stop(self, text: str) -> tuple[str, str | None]:
        """Return the text that may be shown, and the stop string found, if any."""
        if self._token_count <= self.spec.sampling.min_predict:
            return text, None
        return self._stops.feed(text)

    def stats(self) -> GenerationStats:
        """Return the usage and timing so far. Thread-safe."""
        now = self._finished_at or time.monotonic()
        # The engine's thread sets these in the opposite order, so a set `first` implies `admitted`.
        first, admitted = self._first_token_at, self._admitted_at
        return GenerationStats(
            prompt_count=len(self.spec.prompt_ids),
            cached_count=self._cached_count,
            eval_count=self._token_count,
            queue_seconds=(admitted or now) - self.submitted_at,
            prompt_seconds=None if admitted is None else (first or now) - admitted,
            eval_seconds=None if first is None else now - first,
            reason=self._reason,
            drafted_count=self._drafted_count,
            accepted_count=self._accepted_count,
        )

    def running_seconds(self, result: GenerationResult) -> float:
        """Return the seconds spent in a slot, excluding the time preempted."""
        return result.prompt_seconds + result.eval_seconds - self._preempted_seconds

    def _end_at(self, token_id: int) -> FinishReason | None:
        """Return the finish reason if a token is the last one by id or by count."""
        if token_id in self.end_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if self._token_count >= self.spec.max_tokens else None

    def _read(self, token_id: int, end: FinishReason | None) -> str:
        """Return the text completed by a token; an end token has no text itself."""
        text = "" if end is FinishReason.STOP else self._decoder.push(token_id)
        return text + self._decoder.flush() if end else text

    def _is_satisfied(self, *, is_cut: bool) -> bool | None:
        """Return whether the text obeys the constraint; None without one.

        Args:
            is_cut: Whether the matcher has seen text that is not shown.
        """
        if self.matcher is None:
            return None
        return self.matcher.accepts("".join(self._texts)) if is_cut else self.matcher.is_satisfied

    def _result(
        self, reason: FinishReason, stop_match: str, is_satisfied: bool | None
    ) -> GenerationResult:
        self._reason = reason
        self._finish()
        stats = self.stats()
        return GenerationResult(
            reason=reason,
            stop_match=stop_match,
            prompt_count=stats.prompt_count,
            eval_count=stats.eval_count,
            queue_seconds=stats.queue_seconds,
            prompt_seconds=stats.prompt_seconds or 0.0,
            eval_seconds=stats.eval_seconds or 0.0,
            cached_count=stats.cached_count,
            is_satisfied=is_satisfied,
            drafted_count=stats.drafted_count,
            accepted_count=stats.accepted_count,
        )
