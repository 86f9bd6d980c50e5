"""Seeded random mix of requests to a pool, and the known prompts."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

from soak.pool.models import VOCABULARY
from soak.pool.records import PoolOrder

PROMPTS = 6
MAX_PROMPT_TOKENS = 200
MAX_NEW_TOKENS = 48

CANCELLED_SHARE = 0.1
CUT_SHARE = 0.1
STAYING_SHARE = 0.1
TIMEOUT_SHARE = 0.1
REPEATED_SHARE = 0.5
"""Shares of all requests, drawn independently: cancelled, cut after some tokens, without eviction,
with a timeout, and for the same model as the request before. Other requests choose a model by
Zipf's law."""

_MAX_CANCEL_SECONDS = 3.0
_TIMEOUT_SECONDS = (0.2, 6.0)
_MEAN_PAUSE_SECONDS = 0.3


def known_prompts(seed: int) -> list[tuple[int, ...]]:
    """Return the prompts, as token ids, for which the answer of every model is recorded."""
    source = random.Random(f"{seed} prompts")
    lengths = [source.randint(2, MAX_PROMPT_TOKENS) for _ in range(PROMPTS)]
    return [tuple(source.choices(range(VOCABULARY), k=length)) for length in lengths]


class PoolMix:
    """Source of the requests of one caller.

    Args:
        models: Names of the models, the most frequent one first.
        seed: Seed of every choice, for this caller only.
        first: Model of the first request.
        may_be_short: As in the orders.
    """

    def __init__(
        self, models: Sequence[str], seed: str, first: str, *, may_be_short: bool = False
    ) -> None:
        self._models = models
        self._weights = list(itertools.accumulate(1 / (i + 1) for i in range(len(models))))
        self._random = random.Random(seed)
        self._may_be_short = may_be_short
        self._last = ""
        self._first = first

    def next(self) -> PoolOrder:
        """Return the next request."""
        source = self._random
        self._last = self._model()
        return PoolOrder(
            model=self._last,
            prompt=source.randrange(PROMPTS),
            count=source.randint(1, MAX_NEW_TOKENS),
            pause_seconds=source.expovariate(1 / _MEAN_PAUSE_SECONDS),
            may_evict=not self._hits(STAYING_SHARE),
            timeout_seconds=(
                source.uniform(*_TIMEOUT_SECONDS) if self._hits(TIMEOUT_SHARE) else None
            ),
            cancel_seconds=(
                source.uniform(0, _MAX_CANCEL_SECONDS) if self._hits(CANCELLED_SHARE) else None
            ),
            cancel_tokens=source.randint(1, MAX_NEW_TOKENS) if self._hits(CUT_SHARE) else None,
            may_be_short=self._may_be_short,
        )

    def _model(self) -> str:
        if not self._last:
            return self._first
        if self._hits(REPEATED_SHARE):
            return self._last
        return self._random.choices(self._models, cum_weights=self._weights)[0]

    def _hits(self, share: float) -> bool:
        return self._random.random() < share
