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
from bench.results import Case
from bench.session import Session

MEASURE = "open-loop"
MODEL = "llama-1m"
SHARES = (50, 80, 95)
"""Rates of arrival, in percent of the contender's own capacity."""

EQUAL = "equal"
"""Case of the rate that is the same for all: ``EQUAL_SHARE`` percent of the lowest capacity."""

EQUAL_SHARE = 80

REQUESTS = 120
"""Requests of each rate in each round."""

PREFIXES = 8
PREFIX_TOKENS = 256
PROMPT_TOKENS = 288
MAX_TOKENS = 32

CAPACITY_REQUESTS = 64
"""Requests sent at once to measure the capacity: as many as run at a time. With twice as many,
mlx-lm's server, whose queue of connections is short, took minutes."""


async def measure(session: Session) -> None:
    """Measure the capacity of every contender, then first tokens and times per token."""
    fleet = await session.fleet(MODEL, MEASURE, fresh=True)
    prompts = session.prompts(MODEL)
    shared = [prompts.words(PREFIX_TOKENS) for _ in range(PREFIXES)]

    def requests(count: int) -> list[Request]:
        beginnings = itertools.islice(itertools.cycle(shared), count)
        return [Request(prompts.words(PROMPT_TOKENS, each), MAX_TOKENS) for each in beginnings]

    capacities: dict[str, float] = {}

    async def turn(contender: Contender, index: int) -> list[Sample]:
        capacity = throughput(await contender.run(requests(CAPACITY_REQUESTS)))
        samples = [Sample("capacity", "all", capacity)]
        if index == WARM_UP:
            # The prefixes are in the caches now, and every capacity is known before the rounds.
            capacities[contender.name] = capacity
            return samples
        equal = min(capacities.values()) * EQUAL_SHARE / 100
        rates: dict[Case, float] = {share: capacity * share / 100 for share in SHARES}
        for case, rate in {**rates, EQUAL: equal}.items():
            arriving = at_random(requests(REQUESTS), rate, seed=index)
            samples += [Sample("arrival_rate", case, rate)]
            samples += _samples(case, await contender.run(arriving))
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


def _samples(case: Case, records: list[Record]) -> list[Sample]:
    return [
        sample
        for each in records
        for sample in (
            Sample("ttft_seconds", case, each.ttft_seconds),
            Sample("token_seconds", case, (each.last - each.first) / (MAX_TOKENS - 1)),
        )
    ]
