"""Growth of the time to first token with prompt length and prefix cache entries."""

from __future__ import annotations

from bench.contenders import OURS, Contender
from bench.contenders.base import PARALLEL, Setup
from bench.fleet import Fleet, Sample, Turn
from bench.measures.prefix import FRESH_TOKENS, PROMPT_TOKENS
from bench.models import LONG, context_length, ensure_model
from bench.prompts import Prompts
from bench.records import Request
from bench.session import Session

MODEL = "llama-1m"
LENGTHS = (256, 512, 1024, 2048, 4096)
LONG_LENGTHS = (8192, 16_384, 32_000)
"""Lengths measured once, since a prompt takes minutes."""

LONG_CONTENDERS = ("direct", OURS)
ENTRIES = (0, 200, 2_000, 10_000)

_MAX_TOKENS = 4
_PROBES = 5
_UNRELATED_TOKENS = 256
_ENTRY_TOKENS = 64


async def measure_prompt_length(session: Session) -> None:
    """Measure prompts of several lengths, one at a time."""
    fleet = await session.fleet(MODEL, "prompt-length")
    prompts = session.prompts(MODEL)
    of_round: dict[int, list[Request]] = {}

    async def turn(contender: Contender, index: int) -> list[Sample]:
        if index not in of_round:
            of_round[index] = [Request(prompts.words(size), _MAX_TOKENS) for size in LENGTHS]
        return [
            Sample("ttft_seconds", len(request.prompt.token_ids), await _ttft(contender, request))
            for request in of_round[index]
        ]

    await fleet.rounds("prompt-length", turn, session.settings.rounds)


async def measure_long_prompts(session: Session) -> None:
    """Measure the longest prompts once, without the peers' servers."""
    await session.close()
    path, prompts = ensure_model(LONG), session.prompts(LONG)
    setup = Setup(path, context_length(path), "auto")
    fleet = Fleet(LONG, setup, session.others(LONG_CONTENDERS), session.results)
    requests = [Request(prompts.words(size), _MAX_TOKENS) for size in LONG_LENGTHS]

    async def turn(contender: Contender, _: int) -> list[Sample]:
        return [
            Sample("ttft_seconds", len(request.prompt.token_ids), await _ttft(contender, request))
            for request in requests
        ]

    try:
        await fleet.start("long-prompts")
        await fleet.rounds("long-prompts", turn, 1, warm_up=False)
    finally:
        await fleet.stop()


async def measure_cache_entries(session: Session) -> None:
    """Measure unrelated and shared prompts as the prefix cache fills with other prompts."""
    fleet = await session.fleet(MODEL, "cache-entries", fresh=True)
    prompts = session.prompts(MODEL)
    held = 0
    for entries in ENTRIES:
        fill = _fill(prompts, entries - held)
        await fleet.rounds("cache-entries", fill, 1, warm_up=False)
        held = entries
        # Only the first pass needs a warm-up; another one would only add cache entries.
        await fleet.rounds("cache-entries", _probe(prompts, entries), 1, warm_up=entries == 0)


def _fill(prompts: Prompts, count: int) -> Turn:
    requests = [Request(prompts.words(_ENTRY_TOKENS), 1) for _ in range(count)]

    async def turn(contender: Contender, _: int) -> list[Sample]:
        for begin in range(0, count, PARALLEL):
            await contender.run(requests[begin : begin + PARALLEL])
        return []

    return turn


def _probe(prompts: Prompts, entries: int) -> Turn:
    of_round: dict[int, tuple[list[Request], list[Request]]] = {}

    async def turn(contender: Contender, index: int) -> list[Sample]:
        unrelated, (seed, *hits) = of_round.setdefault(index, _probes(prompts))
        misses = [await _ttft(contender, request) for request in unrelated]
        await contender.run([seed])
        found = [await _ttft(contender, request) for request in hits]
        return [
            *(Sample("unrelated_ttft_seconds", entries, seconds) for seconds in misses),
            *(Sample("hit_ttft_seconds", entries, seconds) for seconds in found),
        ]

    return turn


def _probes(prompts: Prompts) -> tuple[list[Request], list[Request]]:
    """Return unrelated prompts, and prompts that differ only in the last tokens."""
    unrelated = [Request(prompts.words(_UNRELATED_TOKENS), _MAX_TOKENS) for _ in range(_PROBES)]
    shared = prompts.words(PROMPT_TOKENS - FRESH_TOKENS)
    alike = [Request(prompts.words(PROMPT_TOKENS, shared), _MAX_TOKENS) for _ in range(_PROBES + 1)]
    return unrelated, alike


async def _ttft(contender: Contender, request: Request) -> float:
    (record,) = await contender.run([request])
    return record.ttft_seconds
