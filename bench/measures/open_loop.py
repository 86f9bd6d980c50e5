"""Latencies under requests that arrive at random, whether earlier ones are done or not.

A closed loop sends a request when another one ends, so a slow server gets less work and looks
better than it is to users who do not wait for each other.
"""

from __future__ import annotations

import itertools
import random

from bench.contenders import Contender
from bench.fleet import WARM_UP, Sample
from bench.records import Record, Request
from bench.session import Session

MEASURE = "open-loop"
MODEL = "llama-1m"
SHARES = (50, 80, 95)
"""Rates of arrival, in percent of the contender's own capacity."""

REQUESTS = 120
"""Requests of each rate in each round."""

PREFIXES = 8
PREFIX_TOKENS = 256
PROMPT_TOKENS = 288
MAX_TOKENS = 32

CAPACITY_REQUESTS = 64
"""Requests sent at once to measure the capacity: twice as many as run at a time."""


async def measure(session: Session) -> None:
    """Measure the capacity of every contender, then first tokens and times per token."""
    fleet = await session.fleet(MODEL, MEASURE)
    prompts = session.prompts(MODEL)
    shared = [prompts.words(PREFIX_TOKENS) for _ in range(PREFIXES)]

    def requests(count: int) -> list[Request]:
        beginnings = itertools.islice(itertools.cycle(shared), count)
        return [Request(prompts.words(PROMPT_TOKENS, each), MAX_TOKENS) for each in beginnings]

    async def turn(contender: Contender, index: int) -> list[Sample]:
        capacity = throughput(await contender.run(requests(CAPACITY_REQUESTS)))
        samples = [Sample("capacity", "all", capacity)]
        # The warm-up leaves the prefixes in the caches.
        for share in SHARES if index != WARM_UP else ():
            arriving = at_random(requests(REQUESTS), capacity * share / 100, seed=index)
            samples += _samples(share, await contender.run(arriving))
        return samples

    await fleet.rounds(MEASURE, turn, session.settings.rounds)


def throughput(records: list[Record]) -> float:
    """Return the requests per second of requests that were sent at once."""
    return len(records) / (max(each.last for each in records) - min(each.sent for each in records))


def at_random(requests: list[Request], per_second: float, seed: int) -> list[Request]:
    """Return requests as a Poisson process, the same one for every rate but for its pace."""
    draw = random.Random(seed)  # noqa: S311 - reproducible
    times = itertools.accumulate(draw.expovariate(1) / per_second for _ in requests)
    return [
        Request(request.prompt, request.max_tokens, delay_seconds=time)
        for request, time in zip(requests, times, strict=True)
    ]


def _samples(share: int, records: list[Record]) -> list[Sample]:
    return [
        sample
        for each in records
        for sample in (
            Sample("ttft_seconds", share, each.ttft_seconds),
            Sample("token_seconds", share, (each.last - each.first) / (MAX_TOKENS - 1)),
        )
    ]
