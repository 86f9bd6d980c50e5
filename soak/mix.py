"""Seeded random mix of requests: sizes, options, readers and cancellations."""

from __future__ import annotations

import math
import random
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mlxrunner.v1 import runner_pb2 as pb
from soak.records import Order, Reader

CANCELLED_SHARE = 0.45
DEADLINE_SHARE = 0.1
SLOW_SHARE = 0.05
STOPPED_SHARE = 0.02
KNOWN_SHARE = 0.25
INVALID_SHARE = 0.02
OWN_CONNECTION_SHARE = 0.05
"""Shares of all requests, drawn independently: a slow reader may also have a deadline and be
cancelled. Some requests finish before the planned cancellation, so about a third is cancelled."""

TOKEN_IDS_SHARE = 0.3
SHARED_BEGINNING_SHARE = 0.3
SEED_SHARE = 0.5
LOGPROBS_SHARE = 0.2
STOP_SHARE = 0.25
GREEDY_SHARE = 0.3
"""Shares of the requests outside the known set."""

MAX_PROMPT_TOKENS = 500
MAX_NEW_TOKENS = 160
_STOPPED_NEW_TOKENS = 400
"""With 20 log probabilities a token, this exceeds the output the server buffers for a reader."""

_CHARS_PER_TOKEN = 3
_MAX_CANCEL_SECONDS = 2.0
_MAX_CANCEL_MESSAGES = 4
_DEADLINE_SECONDS = (0.02, 4.0)
_SLOW_SECONDS = (0.02, 0.2)
_STOP_SECONDS = (2.0, 10.0)
_SOURCES = ("argparse.py", "textwrap.py", "queue.py", "csv.py", "shutil.py", "heapq.py")
_STOPS = ("\n\n", "return", "self", "def ", "):\n", "é", "    # ")


def source_texts() -> list[str]:
    """Read files of Python's standard library, on which the demo model was trained."""
    folder = Path(sysconfig.get_path("stdlib"))
    return [(folder / name).read_text(encoding="utf-8") for name in _SOURCES]


@dataclass(frozen=True)
class Corpus:
    """Source texts of the prompts.

    Attributes:
        texts: Long texts.
        ids: The texts as token ids.
        vocab_size: Size of the vocabulary.
        context_length: Context length of the model, in tokens.
    """

    texts: Sequence[str]
    ids: Sequence[Sequence[int]]
    vocab_size: int
    context_length: int


class Mix:
    """Generator of requests, deterministic for a given seed.

    Args:
        corpus: Source texts of the prompts.
        seed: Seed of every random choice.
        known: The known set; empty while that set is being generated.
    """

    def __init__(
        self, corpus: Corpus, seed: int, known: Sequence[pb.CompletionRequest] = ()
    ) -> None:
        self._corpus = corpus
        self._random = random.Random(seed)
        self._known = known
        self._beginnings = [text[:600] for text in corpus.texts[:3]]

    def next(self) -> Order:
        """Return the next request with the planned behaviour of the client."""
        if self._chance(INVALID_SHARE):
            return self._invalid()
        stopped = self._chance(STOPPED_SHARE)
        order = self._stopped() if stopped else self._plain()
        if self._chance(CANCELLED_SHARE):
            order = self._cancelled(order)
        if self._chance(DEADLINE_SHARE):
            seconds = self._random.uniform(*_DEADLINE_SECONDS)
            order = replace(order, deadline_seconds=seconds)
        if not stopped and self._chance(SLOW_SHARE):
            reader = Reader(pause_seconds=self._random.uniform(*_SLOW_SECONDS))
            order = replace(order, reader=reader)
        return replace(order, own_connection=self._chance(OWN_CONNECTION_SHARE))

    def request(self, *, seeded: bool | None = None) -> pb.CompletionRequest:
        """Return a valid request with random options.

        Args:
            seeded: Make the text reproducible; None chooses at random.
        """
        if seeded is None:
            seeded = self._chance(SEED_SHARE)
        request = pb.CompletionRequest(options=self._options())
        if seeded and request.options.temperature:
            request.options.seed = self._random.getrandbits(63)
        if self._chance(LOGPROBS_SHARE):
            request.logprobs = self._random.choice((0, 1, 5, 20))
        self._set_prompt(request)
        return request

    # -- kinds of requests -------------------------------------------------------

    def _plain(self) -> Order:
        if self._known and self._chance(KNOWN_SHARE):
            number = self._random.randrange(len(self._known))
            return Order(self._known[number], known=number)
        return Order(self.request())

    def _stopped(self) -> Order:
        """Return a request whose reader stops long enough for the row to be preempted."""
        request = self.request()
        request.logprobs = 20
        request.options.num_predict = _STOPPED_NEW_TOKENS
        seconds = self._random.uniform(*_STOP_SECONDS)
        return Order(request, reader=Reader(stop_after=2, stop_seconds=seconds))

    def _cancelled(self, order: Order) -> Order:
        """Return ``order`` with a cancellation at a random time, while queued or during output."""
        if self._chance(0.5):
            seconds = self._random.uniform(0, _MAX_CANCEL_SECONDS)
            return replace(order, cancel_seconds=seconds)
        return replace(order, cancel_messages=self._random.randint(1, _MAX_CANCEL_MESSAGES))

    def _invalid(self) -> Order:
        """Return an invalid request with the expected error reason."""
        request = pb.CompletionRequest(prompt="def ")
        kind = self._random.randrange(4)
        if kind == 0:
            request.options.temperature = -1
        elif kind == 1:
            request.prompt_token_ids.ids.append(self._corpus.vocab_size)
        elif kind == 2:
            request.prompt = ""
        else:
            request.prompt_token_ids.ids.extend([5] * self._corpus.context_length)
            return Order(request, expected_reason="PROMPT_TOO_LONG")
        return Order(request, expected_reason="INVALID_FIELD")

    # -- parts of a request ------------------------------------------------------

    def _options(self) -> pb.CompletionOptions:
        pick = self._random.choice
        options = pb.CompletionOptions(num_predict=self._size(1, MAX_NEW_TOKENS))
        if self._chance(GREEDY_SHARE):
            options.temperature = 0
        else:
            options.temperature = pick((0.5, 0.8, 1.0, 1.5))
            options.top_p = pick((0.5, 0.9, 1.0))
            options.top_k = pick((0, 1, 20, 40))
            options.min_p = pick((0.0, 0.05))
        if self._chance(0.3):
            options.repeat_penalty = pick((1.1, 1.3))
            options.frequency_penalty = pick((0.0, 0.5))
            options.presence_penalty = pick((0.0, 0.5))
        if self._chance(STOP_SHARE):
            options.stop.extend(self._random.sample(_STOPS, self._random.randint(1, 3)))
        return options

    def _set_prompt(self, request: pb.CompletionRequest) -> None:
        index = self._random.randrange(len(self._corpus.texts))
        tokens = self._size(2, MAX_PROMPT_TOKENS)
        if self._chance(TOKEN_IDS_SHARE):
            ids = self._corpus.ids[index]
            begin = self._begin(len(ids) - tokens)
            request.prompt_token_ids.ids.extend(ids[begin : begin + tokens])
            return
        head = ""
        if self._chance(SHARED_BEGINNING_SHARE):
            head = self._random.choice(self._beginnings)
        text = self._corpus.texts[index]
        size = max(0, tokens * _CHARS_PER_TOKEN - len(head))
        begin = self._begin(len(text) - size)
        request.prompt = head + text[begin : begin + size]

    def _begin(self, choices: int) -> int:
        return self._random.randrange(max(1, choices))

    def _size(self, low: int, high: int) -> int:
        """Draw a size uniformly on a logarithmic scale, so that small sizes are more common."""
        return round(math.exp(self._random.uniform(math.log(low), math.log(high))))

    def _chance(self, share: float) -> bool:
        return self._random.random() < share


def known_set(corpus: Corpus, seed: int, count: int) -> list[pb.CompletionRequest]:
    """Return requests whose text is reproducible."""
    mix = Mix(corpus, seed)
    return [mix.request(seeded=True) for _ in range(count)]
