"""Trace of requests: models alternate, each asked for in a burst, whether or not it can answer."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.records import Prompt, Request

MAX_BURST = 4
MEAN_SPACING_SECONDS = 0.3
MEAN_GAP_SECONDS = 4.0
MAX_TOKENS = 32


@dataclass(frozen=True, slots=True)
class PooledRequest(Request):
    """A request for one of several models.

    Attributes:
        model: Name of the model.
    """

    model: str = ""


def make_trace(
    models: Sequence[str], seconds: float, new_prompt: Callable[[], Prompt], seed: int = 0
) -> list[PooledRequest]:
    """Return the requests of a trace, in order of their times.

    A burst is 1 to 4 requests for one model, which is not that of the burst before. Intervals are
    exponential.

    Args:
        models: Names of at least two models.
        seconds: Time of the last request, at most.
        new_prompt: Returns the prompt of the next request.
        seed: Seed of every choice.
    """
    source = random.Random(seed)
    requests: list[PooledRequest] = []
    at, last = 0.0, ""
    while True:
        last = source.choice([model for model in models if model != last])
        for _ in range(source.randint(1, MAX_BURST)):
            if at > seconds:
                return requests
            requests.append(PooledRequest(new_prompt(), MAX_TOKENS, delay_seconds=at, model=last))
            at += source.expovariate(1 / MEAN_SPACING_SECONDS)
        at += source.expovariate(1 / MEAN_GAP_SECONDS)
