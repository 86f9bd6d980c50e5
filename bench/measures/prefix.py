"""Time to first token of a prompt that is new only in the last eight tokens."""

from __future__ import annotations

from bench.contenders import Contender
from bench.fleet import Sample
from bench.records import Request
from bench.session import Session

MODEL = "llama-1m"
PROMPT_TOKENS = 1024
FRESH_TOKENS = 8

_PROBES = 5
_MAX_TOKENS = 4


async def measure(session: Session) -> None:
    """Measure a new prompt, then prompts with the same prefix and different ends."""
    fleet = await session.fleet(MODEL, "prefix")
    prompts = session.prompts(MODEL)
    of_round: dict[int, list[Request]] = {}

    def requests() -> list[Request]:
        shared = prompts.words(PROMPT_TOKENS - FRESH_TOKENS)
        return [
            Request(prompts.words(PROMPT_TOKENS, shared), _MAX_TOKENS) for _ in range(_PROBES + 1)
        ]

    async def turn(contender: Contender, index: int) -> list[Sample]:
        first, *probes = of_round.setdefault(index, requests())
        (record,) = await contender.run([first])
        samples = [Sample("ttft_seconds", "first", record.ttft_seconds)]
        for probe in probes:
            (record,) = await contender.run([probe])
            samples.append(Sample("ttft_seconds", "shared", record.ttft_seconds))
        return samples

    await fleet.rounds("prefix", turn, session.settings.rounds)
