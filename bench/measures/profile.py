"""CPU time of the runner by kind of work, while a prompt is evaluated and while streams decode."""

from __future__ import annotations

import asyncio
import math

from bench.contenders import OURS
from bench.contenders.ours import Ours
from bench.measures.throughput import PLANS
from bench.perf import profile
from bench.prompts import Prompts
from bench.records import ContenderError, Record, Request
from bench.results import Key
from bench.session import Session, setup

MEASURE = "profile"
STREAMS = (1, 16)
PREFILL = "prefill"

_PROMPT_TOKENS = 512
_SECONDS = 2.0
_MARGIN_SECONDS = 0.3
"""Time that the load lasts before and after the profile."""

_PROBE_TOKENS = 24
_MOST_TOKENS = 960
"""Tokens of a stream at most, which fit every context."""


async def measure(session: Session) -> None:
    """Profile the runner with every model of the throughput."""
    if OURS not in session.settings.contenders:
        return
    await session.close()
    for model in PLANS:
        ours = Ours(setup(model))
        try:
            await ours.start()
            for streams in STREAMS:
                load = await _decoding(ours, session.prompts(model), streams)
                await _profile(session, ours, load, f"decode, {streams}")
            load = await _prefilling(ours, session.prompts(model))
            await _profile(session, ours, load, PREFILL)
        except (ContenderError, OSError, TimeoutError) as error:
            session.results.fail(OURS, f"{MEASURE}, {model}", str(error))
        finally:
            await ours.stop()


async def _profile(session: Session, ours: Ours, load: list[Request], case: str) -> None:
    running = asyncio.create_task(ours.run(load))
    try:
        await asyncio.sleep(_MARGIN_SECONDS)
        kinds = await profile(ours.pid, _SECONDS)
    finally:
        await running
    model = ours.setup.model.name
    for kind, cpus in kinds.items():
        session.results.add(Key(MEASURE, model, OURS, kind, case), cpus)


async def _decoding(ours: Ours, prompts: Prompts, streams: int) -> list[Request]:
    """Return streams that decode for as long as the profile takes."""
    probe = await ours.run(_requests(prompts, streams, 16, _PROBE_TOKENS))
    tokens = math.ceil(_rate(probe) / streams * (_SECONDS + 2 * _MARGIN_SECONDS))
    return _requests(prompts, streams, 16, min(tokens, _MOST_TOKENS))


async def _prefilling(ours: Ours, prompts: Prompts) -> list[Request]:
    """Return prompts that take as long as the profile, one after another."""
    (probe,) = await ours.run(_requests(prompts, 1, _PROMPT_TOKENS, 1))
    count = math.ceil((_SECONDS + 2 * _MARGIN_SECONDS) / probe.ttft_seconds)
    return _requests(prompts, count, _PROMPT_TOKENS, 1)


def _requests(prompts: Prompts, count: int, size: int, tokens: int) -> list[Request]:
    return [Request(prompts.words(size), tokens) for _ in range(count)]


def _rate(records: list[Record]) -> float:
    seconds = max(each.last for each in records) - min(each.first for each in records)
    return sum(each.completion_tokens for each in records) / seconds
