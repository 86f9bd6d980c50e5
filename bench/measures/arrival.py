"""Arrival of a long prompt while a stream runs: stalls, first token, health latency."""

from __future__ import annotations

import asyncio

from bench.contenders import Contender
from bench.contenders.base import Probe
from bench.fleet import WARM_UP, Sample
from bench.load import poll
from bench.prompts import Prompts
from bench.records import Record, Request, longest_gap
from bench.session import Session

MODEL = "llama-1m"
LONG_TOKENS = 6000

_ARRIVAL_SECONDS = 1.0
_RUNNING_TOKENS = 7000
_SHORT_TOKENS = 64
_LONG_MAX_TOKENS = 8
_POLL_SECONDS = 0.01
_WARM_UP_LONG_TOKENS = 512


async def measure_gap(session: Session) -> None:
    """Measure the longest gap of the running stream and the long prompt's first token."""
    fleet = await session.fleet(MODEL, "arrival")
    prompts = session.prompts(MODEL)
    of_round: dict[int, list[Request]] = {}

    async def turn(contender: Contender, index: int) -> list[Sample]:
        requests = of_round.setdefault(index, _requests(prompts, index))
        running, arriving = await contender.run(requests)
        session.results.timelines[contender.name] = _timeline(running, arriving)
        gap = longest_gap(running, arriving.sent, arriving.first)
        before = longest_gap(running, running.first, arriving.sent)
        return [
            Sample("gap_seconds", "before", before),
            Sample("gap_seconds", LONG_TOKENS, gap),
            Sample("ttft_seconds", LONG_TOKENS, arriving.ttft_seconds),
        ]

    await fleet.rounds("arrival", turn, session.settings.rounds)


async def measure_health(session: Session) -> None:
    """Measure the latency of health calls during the prefill of the long prompt."""
    fleet = await session.fleet(MODEL, "health")
    prompts = session.prompts(MODEL)
    of_round: dict[int, list[Request]] = {}

    async def turn(contender: Contender, index: int) -> list[Sample]:
        probes = contender.probes()
        if not probes:
            return []
        requests = of_round.setdefault(index, _requests(prompts, index))
        return await _with_probes(contender, requests, probes)

    await fleet.rounds("health", turn, session.settings.rounds)


def _requests(prompts: Prompts, index: int) -> list[Request]:
    long_tokens = _WARM_UP_LONG_TOKENS if index == WARM_UP else LONG_TOKENS
    running = Request(prompts.words(_SHORT_TOKENS), _RUNNING_TOKENS, background=True)
    arriving = Request(prompts.words(long_tokens), _LONG_MAX_TOKENS, delay_seconds=_ARRIVAL_SECONDS)
    return [running, arriving]


async def _with_probes(
    contender: Contender, requests: list[Request], probes: dict[str, Probe]
) -> list[Sample]:
    tasks = {
        name: asyncio.create_task(poll(probe, _POLL_SECONDS)) for name, probe in probes.items()
    }
    try:
        _, arriving = await contender.run(requests)
    finally:
        for task in tasks.values():
            task.cancel()
    samples = []
    for name, task in tasks.items():
        samples += [
            Sample("latency_seconds", name, latency)
            for begin, latency in await task
            if arriving.sent <= begin <= arriving.first
        ]
    return samples


def _timeline(running: Record, arriving: Record) -> list[float]:
    """Return the message times of the running stream, in seconds after the arrival."""
    return [round(time - arriving.sent, 4) for time, _ in running.chunks]
