"""One completion while the engine works on it: text, counts, times, its end."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace

from runner_server.engine.backend import Codec
from runner_server.engine.output import OutputChannel
from runner_server.engine.text import StopMatcher, StreamDecoder
from runner_server.engine.types import (
    CompletionSpec,
    FinishReason,
    GenerationResult,
    GenerationStats,
    OutputDelta,
    Prefill,
    Token,
)
from runner_server.errors import RunnerFault

_ids = itertools.count(1)


class GenerationRequest:
    """Turns the tokens of one row into the pieces of one stream.

    Used on the engine thread, except for :meth:`stats` and the attributes that never change.

    Args:
        spec: What was asked for.
        codec: The tokenizer of the model it was validated for.
        eos_token_ids: The ids that end a text of the model.

    Attributes:
        id: Unique in this process; never the caller's own id.
        stream: Where its reader waits.
    """

    def __init__(self, spec: CompletionSpec, codec: Codec, eos_token_ids: frozenset[int]) -> None:
        self.id = next(_ids)
        self.spec = spec
        self.stream = OutputChannel()
        self._decoder = StreamDecoder(codec.decode, spec.prompt_ids)
        self._matcher = StopMatcher(spec.stop)
        own_ends = frozenset[int]() if spec.ignore_eos else eos_token_ids
        self._end_ids = own_ends | spec.stop_token_ids
        self._count = 0
        self._cached = 0
        self._submitted = time.monotonic()
        self._admitted: float | None = None
        self._first: float | None = None
        self._ended: float | None = None
        self._reason: FinishReason | None = None
        self._left: float | None = None
        self._away_seconds = 0.0

    @property
    def max_length(self) -> int:
        """Tokens its sequence may come to have."""
        return len(self.spec.prompt_ids) + self.spec.max_tokens

    @property
    def length(self) -> int:
        """Tokens its sequence has."""
        return len(self.spec.prompt_ids) + self._count

    @property
    def has_output(self) -> bool:
        """Whether it has got a token."""
        return self._count > 0

    def admit(self) -> None:
        """Notes that the row has its place in the batch."""
        self._admitted = time.monotonic()

    def preempt(self) -> None:
        """Notes that its place goes to others until its reader has read on."""
        self._left = time.monotonic()

    def resume(self) -> None:
        """Notes that it has a place again."""
        if self._left is not None:
            self._away_seconds += time.monotonic() - self._left
            self._left = None

    def running_seconds(self, done: GenerationResult) -> float:
        """How long it has had a place: so long others waited for one, and no longer."""
        return done.prompt_seconds + done.eval_seconds - self._away_seconds

    def on_prefill(self, event: Prefill) -> None:
        """Passes progress of the prompt on."""
        self._cached = event.cached
        self.stream.put(OutputDelta(prefill=(event.prefilled, event.total)))

    def on_token(self, event: Token) -> GenerationResult | None:
        """Adds a token; returns how the completion ended if this was the last."""
        if not self._count:
            self._first = time.monotonic()
        self._count += 1
        end = self._end_at(event.token_id)
        text = self._read(event.token_id, end)
        shown, stop = self._matcher.feed(text)
        if stop is not None:
            end = FinishReason.STOP
        elif end:
            shown += self._matcher.flush()
        done = self._done(end, stop or "") if end else None
        logprobs = (replace(event.logprob, text=text),) if event.logprob else ()
        self.stream.put(OutputDelta(shown, (event.token_id,), logprobs, done=done))
        return done

    def fail(self, fault: RunnerFault) -> None:
        """Ends the stream with an error."""
        self._ended = time.monotonic()
        self.stream.fail(fault)

    def stats(self) -> GenerationStats:
        """What it has come to; any thread may ask, at any time."""
        now = self._ended or time.monotonic()
        # The engine's thread sets them in the other order.
        first, admitted = self._first, self._admitted
        return GenerationStats(
            prompt_count=len(self.spec.prompt_ids),
            cached_count=self._cached,
            eval_count=self._count,
            queue_seconds=(admitted or now) - self._submitted,
            prompt_seconds=None if admitted is None else (first or now) - admitted,
            eval_seconds=None if first is None else now - first,
            reason=self._reason,
        )

    def _end_at(self, token_id: int) -> FinishReason | None:
        """Why a token is the last, whatever its text is."""
        if token_id in self._end_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if self._count >= self.spec.max_tokens else None

    def _read(self, token_id: int, end: FinishReason | None) -> str:
        """The text that a token makes certain; one that ends the text has none of its own."""
        text = "" if end is FinishReason.STOP else self._decoder.push(token_id)
        return text + self._decoder.flush() if end else text

    def _done(self, reason: FinishReason, stop_match: str) -> GenerationResult:
        self._ended, self._reason = time.monotonic(), reason
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
        )
