"""One completion while the engine works on it: text, counts, times, its end."""

from __future__ import annotations

import itertools
import time

from runner_server.backend import Codec
from runner_server.errors import RunnerFault
from runner_server.messages import CompletionSpec, Done, DoneReason, Piece, Prefill, Token
from runner_server.stream import Stream
from runner_server.text import StopMatcher, StreamDecoder

_ids = itertools.count(1)


class Completion:
    """Turns the tokens of one row into the pieces of one stream.

    Used on the engine thread, except for its attributes that never change.

    Args:
        spec: What was asked for.
        codec: The tokenizer of the model it was validated for.
        eos_token_ids: The ids that end a text.

    Attributes:
        id: Unique in this process; never the caller's own id.
        stream: Where its reader waits.
    """

    def __init__(self, spec: CompletionSpec, codec: Codec, eos_token_ids: frozenset[int]) -> None:
        self.id = next(_ids)
        self.spec = spec
        self.stream = Stream()
        self._decoder = StreamDecoder(codec.decode, spec.prompt_ids)
        self._matcher = StopMatcher(spec.stop)
        self._eos_token_ids = eos_token_ids
        self._count = 0
        self._cached = 0
        self._submitted = self._admitted = self._first = time.monotonic()

    @property
    def max_length(self) -> int:
        """Tokens its sequence may come to have."""
        return len(self.spec.prompt_ids) + self.spec.max_tokens

    @property
    def length(self) -> int:
        """Tokens its sequence has."""
        return len(self.spec.prompt_ids) + self._count

    @property
    def has_begun(self) -> bool:
        """Whether it has got a token."""
        return self._count > 0

    def admit(self) -> None:
        """Notes that the row has its place in the batch."""
        self._admitted = self._first = time.monotonic()

    def on_prefill(self, event: Prefill) -> None:
        """Passes progress of the prompt on."""
        self._cached = event.cached
        self.stream.put(Piece(prefill=(event.evaluated, event.total)))

    def on_token(self, event: Token) -> Done | None:
        """Adds a token; returns how the completion ended if this was the last."""
        if not self._count:
            self._first = time.monotonic()
        self._count += 1
        text, reason, stop_match = self._advance(event.token_id)
        done = self._done(reason, stop_match) if reason else None
        logprobs = (event.logprob,) if event.logprob else ()
        self.stream.put(Piece(text, (event.token_id,), logprobs, done=done))
        return done

    def fail(self, fault: RunnerFault) -> None:
        """Ends the stream with an error."""
        self.stream.fail(fault)

    def _advance(self, token_id: int) -> tuple[str, DoneReason | None, str]:
        """Returns the text that may be shown, why it ends, and the stop string found."""
        ended = token_id in self._eos_token_ids
        full = self._count >= self.spec.max_tokens
        text = "" if ended else self._decoder.push(token_id)
        if ended or full:
            text += self._decoder.flush()
        shown, stop = self._matcher.feed(text)
        if stop is not None:
            return shown, DoneReason.STOP, stop
        if not (ended or full):
            return shown, None, ""
        return shown + self._matcher.flush(), DoneReason.STOP if ended else DoneReason.LENGTH, ""

    def _done(self, reason: DoneReason, stop_match: str) -> Done:
        now = time.monotonic()
        return Done(
            reason=reason,
            stop_match=stop_match,
            prompt_count=len(self.spec.prompt_ids),
            eval_count=self._count,
            queue_seconds=self._admitted - self._submitted,
            prompt_seconds=self._first - self._admitted,
            eval_seconds=now - self._first,
            cached_count=self._cached,
        )
