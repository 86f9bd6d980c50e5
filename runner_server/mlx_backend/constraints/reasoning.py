"""Constraints that begin after the reasoning, and reasoning of limited length."""

from __future__ import annotations

import codecs
import math
from array import array
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING

from runner_server.chat.format import REASONING
from runner_server.chat.splitter import AnswerSplitter
from runner_server.mlx_backend.sampling.mask_rows import mask_words

if TYPE_CHECKING:
    from llguidance import LLMatcher

    from runner_server.chat.reasoning import Reasoning
    from runner_server.mlx_backend.constraints.grammars import CompiledGrammar
    from runner_server.mlx_backend.constraints.matcher import GrammarMatcher
    from runner_server.mlx_backend.tokenizer.codec import FastCodec

_WORD_BITS = 32


@dataclass(frozen=True)
class Markers:
    """The markers of a model's reasoning as tokens, and the masks of reasoning.

    Attributes:
        begin: The tokens that a model writes for the marker before reasoning.
        end: The same for the marker after it.
        lead: The tokens between the marker after reasoning and the text of a grammar.
        free: Mask of all tokens.
        unfinished: Mask of the tokens that leave the rest of the text to a constraint: none that
            ends the text, and none that goes on after the marker's end.
        crossing: Tokens that go on after the marker's end, by the number of its bytes before them.
    """

    begin: tuple[int, ...]
    end: tuple[int, ...]
    lead: tuple[int, ...]
    free: array[int]
    unfinished: array[int]
    crossing: dict[int, tuple[int, ...]]

    @classmethod
    def read(
        cls,
        codec: FastCodec,
        vocab_size: int,
        end_ids: Collection[int],
        begin: str,
        end: str,
        lead: str,
    ) -> Markers:
        """Find the tokens of markers. Takes 0.4 s of CPU time for 151,936 tokens.

        Args:
            codec: The model's tokenizer, which knows the bytes of its tokens.
            vocab_size: Number of token ids that the output layer scores.
            end_ids: The tokens that end a text.
            begin: The marker before reasoning.
            end: The marker after it.
            lead: The text between that and the text of a grammar.

        Raises:
            ValueError: The model cannot write a marker.
        """
        crossing: dict[int, list[int]] = {}
        for id_, count in _crossing(codec, vocab_size, end):
            crossing.setdefault(count, []).append(id_)
        free = array("I", [0xFFFFFFFF]) * mask_words(vocab_size)
        unfinished = _without(free, (*end_ids, *crossing.pop(0, ())))
        return cls(
            begin=_tokens(codec, vocab_size, begin),
            end=_tokens(codec, vocab_size, end),
            lead=_tokens(codec, vocab_size, lead) if lead else (),
            free=free,
            unfinished=unfinished,
            crossing={count: tuple(ids) for count, ids in crossing.items()},
        )


def _tokens(codec: FastCodec, vocab_size: int, marker: str) -> tuple[int, ...]:
    ids = tuple(codec.encode(marker, as_prompt=False))
    written = b"".join(codec.token_bytes(id_) or b"" for id_ in ids)
    is_plain = marker.isascii() and marker.isprintable() and " " not in marker
    if not is_plain or written != marker.encode() or max(ids) >= vocab_size:
        raise ValueError(f"the model's tokenizer cannot write its marker {marker!r} of reasoning")
    return ids


def _crossing(codec: FastCodec, vocab_size: int, marker: str) -> Iterator[tuple[int, int]]:
    """Yield tokens that go on after a marker's end, with the number of its bytes before them.

    Vocabularies write the characters of markers, which are ASCII, as they are, so few tokens need
    their bytes compared.
    """
    rests = [marker[count:] for count in range(1, len(marker))]
    begins = tuple(rests)
    for text, id_ in codec.vocabulary().items():
        if id_ >= vocab_size or not (marker in text or text.startswith(begins)):
            continue
        data = codec.token_bytes(id_) or b""
        if 0 <= data.find(marker.encode()) < len(data) - len(marker):
            yield id_, 0
        for count, rest in enumerate(rests, start=1):
            if len(data) > len(rest) and data.startswith(rest.encode()):
                yield id_, count


def _without(mask: array[int], ids: Collection[int]) -> array[int]:
    changed = array("I", mask)
    for id_ in ids:
        word, bit = divmod(id_, _WORD_BITS)
        changed[word] &= ~(1 << bit)
    return changed


def _only(mask: array[int], id_: int) -> array[int]:
    """Return a mask of the same size with one token."""
    alone = array("I", bytes(mask.itemsize * len(mask)))
    word, bit = divmod(id_, _WORD_BITS)
    alone[word] = 1 << bit
    return alone


class ReasonedGrammar:
    """Implements ``runner_server.engine.backend.Grammar`` for answers that may reason first.

    Args:
        markers: The markers.
        codec: The model's tokenizer.
        reasoning: The reasoning.
        grammar: Grammar of the text after the reasoning; None for any text.
    """

    def __init__(
        self,
        markers: Markers,
        codec: FastCodec,
        reasoning: Reasoning,
        grammar: CompiledGrammar | None,
    ) -> None:
        self._arguments = markers, codec, reasoning, grammar

    def start(self) -> ReasoningMatcher:
        """Return a matcher at the beginning of an answer; see ``Grammar.start``."""
        return ReasoningMatcher(*self._arguments)


class _Stage(Enum):
    """Where an answer is.

    START: nothing is written, and a grammar follows the reasoning.
    MARKER: within the marker before reasoning, whose rest is forced.
    REASONING: within the reasoning.
    LEAD: within the text between reasoning and grammar, which is forced.
    OUTSIDE: outside the reasoning, without a grammar.
    ANSWER: after the reasoning, within the grammar.
    """

    START = auto()
    MARKER = auto()
    REASONING = auto()
    LEAD = auto()
    OUTSIDE = auto()
    ANSWER = auto()


class ReasoningMatcher:
    """Implements ``runner_server.engine.backend.Matcher``; see :class:`ReasonedGrammar`.

    With a grammar, an answer reasons if its first token begins the marker before reasoning. Any
    other first token is the first of the grammar. Tokens of the reasoning are free, except for the
    end of the text, until the text of the marker after it is complete. A model that begins every
    answer with its reasoning does so here, and the first token of the marker after it forces the
    others.

    Without a grammar, the reasoning is found as in the text of the answer, by the markers anywhere.

    Attributes:
        inner: llguidance's matcher of the next token; None if ``mask`` has the tokens.
        mask: Mask of the next token; None if ``inner`` has it.
        also: A token that is allowed in addition.
    """

    inner: LLMatcher | None
    mask: array[int] | None
    also: int | None

    def __init__(
        self,
        markers: Markers,
        codec: FastCodec,
        reasoning: Reasoning,
        grammar: CompiledGrammar | None,
    ) -> None:
        self._markers, self._codec, self._reasoning = markers, codec, reasoning
        self._grammar = grammar
        self._answer = grammar.start() if grammar else None
        format_ = reasoning.markers
        state = REASONING if reasoning.is_open or grammar else format_.initial
        self._splitter = AnswerSplitter(format_.transitions, state)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._left = math.inf if reasoning.budget is None else reasoning.budget
        self._recent: list[int] = []
        self._forced: list[int] = []
        self._must_reason = bool(grammar and format_.content_start)
        if reasoning.is_open:
            self._reason()
        elif self._must_reason:
            self._begin_marker()
        else:
            self._stage = _Stage.START if grammar else _Stage.OUTSIDE
        self._prepare()

    def consume(self, token_id: int) -> None:
        """Advance by a token."""
        match self._stage:
            case _Stage.START if token_id == self._markers.begin[0]:
                self._begin_marker()
                self._consume_marker()
            case _Stage.MARKER:
                self._consume_marker()
            case _Stage.LEAD:
                self._forced.pop(0)
                self._stage = _Stage.LEAD if self._forced else _Stage.ANSWER
            case _Stage.REASONING | _Stage.OUTSIDE:
                self._read(token_id)
            case _:
                self._stage = _Stage.ANSWER
                if self._answer:
                    self._answer.consume(token_id)
        self._prepare()

    def _begin_marker(self) -> None:
        self._stage = _Stage.MARKER
        self._forced = [*self._markers.begin]

    def _consume_marker(self) -> None:
        self._forced.pop(0)
        if not self._forced:
            self._reason()

    def _reason(self) -> None:
        """Begin the reasoning, or go on with it."""
        self._stage = _Stage.REASONING
        written = _overlap(self._recent, self._markers.end)
        is_over = self._left <= 0 or (self._must_reason and written > 0)
        if is_over and not self._forced:
            self._forced = [*self._markers.end[written:]]

    def _read(self, token_id: int) -> None:
        """Advance by a token whose text may begin or end the reasoning."""
        before = self._splitter.state
        text = self._decoder.decode(self._codec.token_bytes(token_id) or b"")
        for _ in self._splitter.feed(text):
            pass
        if before == REASONING:
            self._left -= 1
            self._recent = [*self._recent, token_id][-len(self._markers.end) :]
            self._forced = self._forced[1:]
        if self._splitter.state == REASONING:
            self._reason()
            return
        self._recent, self._forced = [], []
        self._stage = _Stage.OUTSIDE
        if self._grammar:
            self._forced = [*self._markers.lead]
            self._stage = _Stage.LEAD if self._forced else _Stage.ANSWER

    def _prepare(self) -> None:
        """Set what limits the next token."""
        self.inner = self.mask = self.also = None
        if self._stage in (_Stage.START, _Stage.ANSWER):
            self.inner = self._answer.inner if self._answer else None
            self.also = self._markers.begin[0] if self._stage is _Stage.START else None
        elif self._forced:
            self.mask = _only(self._markers.free, self._forced[0])
        elif self._grammar and self._stage is _Stage.REASONING:
            held = len(self._splitter.held.encode())
            crossing = self._markers.crossing.get(held, ())
            self.mask = (
                _without(self._markers.unfinished, crossing)
                if crossing
                else (self._markers.unfinished)
            )
        else:
            self.mask = self._markers.free

    @property
    def failure(self) -> str:
        """Why no token can continue the text; empty if one can."""
        return self._answer.failure if self._answer and self.inner else ""

    def fork(self) -> GrammarMatcher | None:
        """Return a matcher that continues the answer; None before the answer, or without one."""
        return self._answer.fork() if self._answer and self._stage is _Stage.ANSWER else None

    @property
    def is_satisfied(self) -> bool | None:
        """True if the text after the reasoning obeys the constraint; None without one."""
        if self._answer is None:
            return None
        return self.inner is not None and self._answer.is_satisfied

    def accepts(self, text: str) -> bool | None:
        """Return whether another answer would obey the constraint; see ``Matcher.accepts``."""
        if self._grammar is None:
            return None
        format_ = self._reasoning.markers
        if self._reasoning.is_open or text.startswith(format_.think_start):
            _, end, text = text.partition(format_.think_end + self._reasoning.lead)
            if not end:
                return False
        return self._grammar.start().accepts(text)


def _overlap(written: Sequence[int], marker: Sequence[int]) -> int:
    """Return the number of a marker's tokens with which a text ends."""
    counts = range(min(len(written), len(marker) - 1), 0, -1)
    return next((n for n in counts if [*written[-n:]] == [*marker[:n]]), 0)
