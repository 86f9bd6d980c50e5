"""Resident set of a fresh process, idle and with streams of 1,000 tokens."""

from __future__ import annotations

import asyncio

from bench.contenders import Contender
from bench.fleet import Sample
from bench.records import Request
from bench.session import Session

MODEL = "llama-1m"
STREAMS = (1, 16)

_PROMPT_TOKENS = 900
_MAX_TOKENS = 100
_INTERVAL_SECONDS = 0.02


async def measure(session: Session) -> None:
    """Measure the peak resident set of each run, in freshly started processes."""
    prompts = session.prompts(MODEL)
    for _ in range(session.settings.rounds):
        fleet = await session.fleet(MODEL, "memory", fresh=True)
        runs = {
            streams: [Request(prompts.words(_PROMPT_TOKENS), _MAX_TOKENS) for _ in range(streams)]
            for streams in STREAMS
        }

        async def turn(
            contender: Contender, _: int, runs: dict[int, list[Request]] = runs
        ) -> list[Sample]:
            samples = [Sample("rss_bytes", 0, contender.rss_bytes())]
            for streams, requests in runs.items():
                samples.append(Sample("rss_bytes", streams, await _peak(contender, requests)))
            return samples

        await fleet.rounds("memory", turn, 1, warm_up=False)
    await session.close()


async def _peak(contender: Contender, requests: list[Request]) -> int:
    peak = 0

    async def watch() -> None:
        nonlocal peak
        while True:
            peak = max(peak, contender.rss_bytes())
            await asyncio.sleep(_INTERVAL_SECONDS)

    watcher = asyncio.create_task(watch())
    try:
        await contender.run(requests)
    finally:
        watcher.cancel()
    return peak
